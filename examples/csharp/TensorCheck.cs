using System;
using System.Collections.Generic;
using System.IO;
using System.Linq;
using System.Runtime.InteropServices;
using Microsoft.ML.OnnxRuntime;
using Microsoft.ML.OnnxRuntime.Tensors;

namespace Edifice
{
    /// <summary>What goes into a graph is checked before it does, and what comes out before it is believed.</summary>
    internal static class TensorCheck
    {
        /// <summary>
        /// Refuses tensors that are not what a graph takes. Numbers of states, which it gave, may be any.
        /// </summary>
        /// <param name="name">What takes them, for messages.</param>
        /// <param name="graph">It knows the limits, and which inputs are states.</param>
        /// <param name="specs">Its inputs, or its own alone.</param>
        /// <param name="given">A tensor for each.</param>
        /// <param name="unlimited">A symbol whose limits don't count.</param>
        /// <exception cref="ArgumentException">It says which tensor, what it should be, and what it is.</exception>
        public static void Inputs(
            string name, GraphSpec graph, InputSpec[] specs, EdificeTensor[] given, string unlimited = "")
        {
            Number(name, specs, given.Length);
            var sizes = new Dictionary<string, long>();
            for (int i = 0; i < specs.Length; i++)
            {
                Kind(specs[i], given[i]);
                for (int axis = 0; axis < specs[i].Shape.Length; axis++)
                {
                    Size size = specs[i].Shape[axis];
                    if (size.Symbol is string symbol)
                    {
                        long found = given[i].Shape[axis];
                        Equal(specs[i], symbol, found, sizes);
                        bool limited = graph.Limits.TryGetValue(symbol, out (int, int?) limit) && symbol != unlimited;
                        Within(specs[i], symbol, found, limited ? limit : (size.IsPast ? 0 : 1, null));
                    }
                }
                Numbers(specs[i], given[i].Shape, given[i].Bytes, looks: i < graph.OwnInputs.Length);
            }
        }

        public static void Number(string name, InputSpec[] specs, int given)
        {
            if (given != specs.Length)
            {
                throw new ArgumentException(
                    $"{name} takes {string.Join<InputSpec>(", ", specs)}; got {given} tensors, give one for each");
            }
        }

        /// <summary>Refuses another type or rank, or other sizes where they are fixed.</summary>
        public static void Kind(InputSpec spec, EdificeTensor given)
        {
            bool fits = given.Type == spec.Type && given.Shape.Length == spec.Shape.Length;
            for (int axis = 0; fits && axis < spec.Shape.Length; axis++)
            {
                fits = spec.Shape[axis].Symbol != null || spec.Shape[axis].Number == given.Shape[axis];
            }
            if (!fits)
            {
                throw new ArgumentException(
                    $"{spec.Name} is {ElementTypes.Name(given.Type)} {Text(given.Shape)}, and the model takes {spec}; "
                    + "give that");
            }
        }

        /// <summary>
        /// Refuses another number of numbers than the shape has, and numbers that the input can't hold.
        /// </summary>
        public static void Numbers(InputSpec spec, long[] shape, ReadOnlySpan<byte> bytes, bool looks = true)
        {
            double wanted = 1;
            foreach (long size in shape)
            {
                wanted *= size;
            }
            int found = bytes.Length / ElementTypes.Bytes(spec.Type);
            if (found != wanted)
            {
                throw new ArgumentException(
                    $"{spec.Name} has {found} numbers, and the model takes {wanted:0} "
                    + $"({ElementTypes.Name(spec.Type)} {Text(shape)}); give that many");
            }
            if (looks && spec.Values == Values.Normal)
            {
                Magnitudes(spec, shape, bytes);
            }
            else if (looks && spec.Values == Values.Ids)
            {
                Ids(spec, shape, bytes);
            }
        }

        /// <summary>Refuses an output that is not finite.</summary>
        /// <exception cref="InvalidDataException">It says what follows for the caller, if anything.</exception>
        public static void Finite(TensorSpec spec, EdificeTensor output, string consequence = "")
        {
            if (FirstBeyond(output.Type, output.Bytes, float.MaxValue) >= 0)
            {
                throw new InvalidDataException(
                    $"{spec.Name} is not finite: {ElementTypes.Name(output.Type)} overflows in this model on this input"
                    + $"{consequence}; scale it down, or mend the weights");
            }
        }

        public static string Text(long[] shape) => $"[{string.Join(", ", shape)}]";

        private static void Equal(InputSpec spec, string symbol, long found, Dictionary<string, long> sizes)
        {
            if (sizes.TryGetValue(symbol, out long known) && known != found)
            {
                throw new ArgumentException(
                    $"{spec.Name} has a {symbol} of {found}, and what was given before one of {known}; "
                    + "give the same everywhere");
            }
            sizes[symbol] = found;
        }

        private static void Within(InputSpec spec, string symbol, long found, (int Least, int? Most) limit)
        {
            if (found < limit.Least || found > limit.Most)
            {
                string bound = found > limit.Most
                    ? $"at most {limit.Most}; give fewer" : $"{limit.Least} or more; give more";
                throw new ArgumentException($"{spec.Name} has a {symbol} of {found}, and the model takes {bound}");
            }
        }

        private static void Magnitudes(InputSpec spec, long[] shape, ReadOnlySpan<byte> bytes)
        {
            int place = FirstBeyond(spec.Type, bytes, EdificeModel.MaxMagnitude);
            if (place < 0)
            {
                return;
            }
            float number = spec.Type == TensorElementType.Float
                ? MemoryMarshal.Cast<byte, float>(bytes)[place]
                : (float)MemoryMarshal.Cast<byte, Float16>(bytes)[place];
            throw new ArgumentException($"{spec.Name} holds {number} at {Place(shape, place)}; " + (
                float.IsFinite(number)
                    ? "numbers up to 1e12 are taken, beyond which float32 may overflow; scale or mend the input"
                    : "give finite numbers"));
        }

        private static void Ids(InputSpec spec, long[] shape, ReadOnlySpan<byte> bytes)
        {
            int size = ElementTypes.Bytes(spec.Type);
            for (int i = 0; i < bytes.Length / size; i++)
            {
                long id = spec.Type switch
                {
                    TensorElementType.Int64 => MemoryMarshal.Cast<byte, long>(bytes)[i],
                    TensorElementType.Int32 => MemoryMarshal.Cast<byte, int>(bytes)[i],
                    _ => bytes[i],
                };
                if (id < 0 || id >= spec.Below)
                {
                    throw new ArgumentException(
                        $"{spec.Name} holds {id} at {Place(shape, i)}; there are 0 to {spec.Below - 1}, give those");
                }
            }
        }

        /// <summary>
        /// The place of the first float that is a NaN, infinite, or further from zero than a limit; -1 without one.
        /// </summary>
        private static int FirstBeyond(TensorElementType type, ReadOnlySpan<byte> bytes, float limit)
        {
            if (type == TensorElementType.Float)
            {
                ReadOnlySpan<float> numbers = MemoryMarshal.Cast<byte, float>(bytes);
                for (int i = 0; i < numbers.Length; i++)
                {
                    if (!(Math.Abs(numbers[i]) <= limit)) // a NaN is not
                    {
                        return i;
                    }
                }
            }
            else if (type == TensorElementType.Float16)
            {
                ReadOnlySpan<Float16> numbers = MemoryMarshal.Cast<byte, Float16>(bytes);
                for (int i = 0; i < numbers.Length; i++)
                {
                    if (!(Math.Abs((float)numbers[i]) <= limit))
                    {
                        return i;
                    }
                }
            }
            return -1;
        }

        /// <summary>The indices of a number by its place in a row, such as [0, 2].</summary>
        private static string Place(long[] shape, long place)
        {
            var indices = new long[shape.Length];
            for (int axis = shape.Length - 1; axis >= 0; axis--)
            {
                (indices[axis], place) = (place % shape[axis], place / shape[axis]);
            }
            return Text(indices);
        }
    }
}

using System;
using System.Collections.Generic;
using System.Diagnostics;
using System.Linq;
using Microsoft.ML.OnnxRuntime;
using Microsoft.ML.OnnxRuntime.Tensors;

namespace Edifice
{
    /// <summary>What the self-check and the loop do with numbers.</summary>
    public static class Numbers
    {
        /// <summary>
        /// max |found - expected| / max(1, max |expected|); infinite if it has another type or shape, integers that
        /// differ, or if only one is finite.
        /// </summary>
        public static double Error(EdificeTensor found, EdificeTensor expected)
        {
            if (found.Type != expected.Type || !found.Shape.SequenceEqual(expected.Shape))
            {
                return double.PositiveInfinity;
            }
            return expected.Type switch
            {
                TensorElementType.Float => Error(found.Numbers<float>(), expected.Numbers<float>()),
                TensorElementType.Float16 => Error(Wide(found), Wide(expected)),
                _ => Same(found, expected) ? 0 : double.PositiveInfinity,
            };
        }

        /// <summary>Whether two tensors hold the same bit by bit.</summary>
        public static bool Same(EdificeTensor one, EdificeTensor other) => one.Bytes.SequenceEqual(other.Bytes);

        /// <summary>Whether all tensors hold the same bit by bit.</summary>
        public static bool Same(IReadOnlyList<EdificeTensor> some, IReadOnlyList<EdificeTensor> others)
        {
            bool same = some.Count == others.Count;
            for (int i = 0; same && i < some.Count; i++)
            {
                same = Same(some[i], others[i]);
            }
            return same;
        }

        /// <summary>Tensors of their own memory.</summary>
        public static EdificeTensor[] Copy(IReadOnlyList<EdificeTensor> tensors)
        {
            EdificeTensor[] copies = tensors.Select(tensor => EdificeTensor.Zeros(tensor.Type, tensor.Shape)).ToArray();
            CopyTo(tensors, copies);
            return copies;
        }

        public static void CopyTo(IReadOnlyList<EdificeTensor> tensors, EdificeTensor[] targets)
        {
            for (int i = 0; i < targets.Length; i++)
            {
                tensors[i].Bytes.CopyTo(targets[i].Bytes);
            }
        }

        /// <summary>Of a tensor [batch, length, sizes], what stands at one place of the length.</summary>
        public static EdificeTensor Gather(EdificeTensor sequence, int place)
        {
            return sequence.Part(place, 1).Reshape(sequence.Shape.Where((_, axis) => axis != 1).ToArray());
        }

        /// <summary>Puts a tensor [batch, sizes] at one place of the length of [batch, length, sizes].</summary>
        public static void Scatter(EdificeTensor one, EdificeTensor sequence, int place)
        {
            (long batch, long length) = (sequence.Shape[0], sequence.Shape[1]);
            int size = (int)(one.Bytes.Length / batch);
            for (int entry = 0; entry < batch; entry++)
            {
                one.Bytes.Slice(entry * size, size).CopyTo(sequence.Bytes.Slice((int)(entry * length + place) * size));
            }
        }

        /// <summary>Something that an input may hold, by the sizes of its symbols.</summary>
        public static EdificeTensor Draw(InputSpec spec, IReadOnlyDictionary<string, int> sizes, Random random)
        {
            long Of(Size size) => size.Symbol == null ? size.Number : sizes[size.Symbol];
            return Draw(spec, spec.Shape.Select(Of), random);
        }

        /// <summary>Something that a frame's input may hold, for so many streams.</summary>
        public static EdificeTensor Draw(InputSpec spec, int batch, Random random)
        {
            return Draw(spec, spec.OfBatch(batch), random);
        }

        /// <summary>The same in memory that is there already.</summary>
        public static void Draw(InputSpec spec, EdificeTensor target, Random random)
        {
            int count = target.Bytes.Length / ElementTypes.Bytes(spec.Type);
            int row = spec.Shape.Length == 0 ? 1 : (int)target.Shape[^1];
            int hidden = 0;
            for (int i = 0; i < count; i++)
            {
                if (spec.Values == Values.Mask && i % row == 0)
                {
                    hidden = random.Next(row);
                }
                double number = spec.Values switch
                {
                    Values.Normal => Normal(random),
                    Values.Mask => i % row >= hidden ? 1 : 0,
                    _ => random.Next((int)Math.Min(spec.Below, int.MaxValue)),
                };
                Put(target, i, number);
            }
        }

        /// <summary>The median, the 99th percentile and the largest of some times, in milliseconds.</summary>
        public static (double P50, double P99, double Max) Percentiles(long[] ticks)
        {
            Array.Sort(ticks);
            double At(double part) => ticks[(int)Math.Ceiling(part * ticks.Length) - 1] * 1000.0 / Stopwatch.Frequency;
            return (At(0.5), At(0.99), At(1));
        }

        private static EdificeTensor Draw(InputSpec spec, IEnumerable<long> shape, Random random)
        {
            EdificeTensor drawn = EdificeTensor.Zeros(spec.Type, shape.ToArray());
            Draw(spec, drawn, random);
            return drawn;
        }

        private static double Error(ReadOnlySpan<float> found, ReadOnlySpan<float> expected)
        {
            (double error, double largest) = (0, 1);
            for (int i = 0; i < expected.Length; i++)
            {
                if (!float.IsFinite(found[i]) || !float.IsFinite(expected[i]))
                {
                    if (!found[i].Equals(expected[i]))
                    {
                        return double.PositiveInfinity;
                    }
                    continue;
                }
                error = Math.Max(error, Math.Abs((double)found[i] - expected[i]));
                largest = Math.Max(largest, Math.Abs(expected[i]));
            }
            return error / largest;
        }

        private static float[] Wide(EdificeTensor tensor)
        {
            return tensor.Numbers<Float16>().ToArray().Select(number => (float)number).ToArray();
        }

        /// <summary>By Box and Muller's method.</summary>
        private static double Normal(Random random)
        {
            double radius = Math.Sqrt(-2 * Math.Log(1 - random.NextDouble()));
            return radius * Math.Cos(2 * Math.PI * random.NextDouble());
        }

        private static void Put(EdificeTensor target, int place, double number)
        {
            switch (target.Type)
            {
                case TensorElementType.Float:
                    target.Numbers<float>()[place] = (float)number;
                    break;
                case TensorElementType.Float16:
                    target.Numbers<Float16>()[place] = (Float16)(float)number;
                    break;
                case TensorElementType.Int64:
                    target.Numbers<long>()[place] = (long)number;
                    break;
                case TensorElementType.Int32:
                    target.Numbers<int>()[place] = (int)number;
                    break;
                default:
                    target.Numbers<bool>()[place] = number != 0;
                    break;
            }
        }
    }
}

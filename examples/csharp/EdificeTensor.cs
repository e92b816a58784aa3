using System;
using System.Linq;
using System.Runtime.InteropServices;
using Microsoft.ML.OnnxRuntime;
using Microsoft.ML.OnnxRuntime.Tensors;

namespace Edifice
{
    /// <summary>
    /// Numbers with a shape, the last axis fastest: what models take and give. float32, float16, int64, int32 and bool
    /// of ONNX are float, Float16 (of ONNX Runtime), long, int and bool.
    /// </summary>
    public abstract class EdificeTensor
    {
        private EdificeTensor(TensorElementType type, long[] shape) => (Type, Shape) = (type, shape);

        public TensorElementType Type { get; }
        public long[] Shape { get; }

        internal abstract Span<byte> Bytes { get; }

        /// <summary>Numbers under a shape. They are not copied; a model looks whether they fit.</summary>
        /// <exception cref="ArgumentException">Another type than the five.</exception>
        public static EdificeTensor Of<T>(ReadOnlyMemory<T> numbers, params long[] shape) where T : unmanaged
        {
            return new Held<T>(numbers, shape);
        }

        /// <exception cref="ArgumentException">
        /// Another type than the five, or more numbers than an array holds.
        /// </exception>
        public static EdificeTensor Zeros(TensorElementType type, params long[] shape)
        {
            double count = shape.Aggregate(1.0, (product, size) => product * size);
            if (count > int.MaxValue)
            {
                throw new ArgumentException(
                    $"a tensor of the shape [{string.Join(", ", shape)}] holds more numbers than an array; give less");
            }
            return type switch
            {
                TensorElementType.Float => new Held<float>(new float[(int)count], shape),
                TensorElementType.Float16 => new Held<Float16>(new Float16[(int)count], shape),
                TensorElementType.Int64 => new Held<long>(new long[(int)count], shape),
                TensorElementType.Int32 => new Held<int>(new int[(int)count], shape),
                TensorElementType.Bool => new Held<bool>(new bool[(int)count], shape),
                _ => throw new ArgumentException(
                    $"a tensor holds {ElementTypes.All}, and not {ElementTypes.Name(type)}"),
            };
        }

        /// <summary>The numbers, to read or write.</summary>
        /// <exception cref="ArgumentException">They are of another type.</exception>
        public Span<T> Numbers<T>() where T : unmanaged
        {
            return this is Held<T> held
                ? held.Memory.Span
                : throw new ArgumentException(
                    $"the tensor holds {ElementTypes.Name(Type)}, and was asked for {typeof(T).Name}; "
                    + "ask for its type");
        }

        /// <summary>The same numbers under another shape.</summary>
        public abstract EdificeTensor Reshape(params long[] shape);

        /// <summary>A copy of what ONNX Runtime gave.</summary>
        internal static EdificeTensor Copy(OrtValue value)
        {
            OrtTensorTypeAndShapeInfo info = value.GetTensorTypeAndShape();
            EdificeTensor copy = Zeros(info.ElementDataType, info.Shape);
            value.GetTensorMutableRawData().CopyTo(copy.Bytes);
            return copy;
        }

        /// <summary>Of [batch, frames, sizes], a copy of some frames.</summary>
        internal EdificeTensor Part(int start, int count)
        {
            long[] shape = Shape.ToArray();
            shape[1] = count;
            EdificeTensor part = Zeros(Type, shape);
            int entry = Bytes.Length / (int)Shape[0], frame = entry / (int)Shape[1];
            for (int i = 0; i < Shape[0]; i++)
            {
                Bytes.Slice(i * entry + start * frame, count * frame).CopyTo(part.Bytes.Slice(i * count * frame));
            }
            return part;
        }

        /// <summary>The same memory for ONNX Runtime, pinned until that is disposed.</summary>
        internal abstract OrtValue ToOrtValue();

        internal sealed class Held<T> : EdificeTensor where T : unmanaged
        {
            public Held(ReadOnlyMemory<T> numbers, long[] shape) : base(ElementTypes.Of(typeof(T)), shape)
            {
                // Nothing writes to an input; OrtValue has no read-only kind.
                Memory = MemoryMarshal.AsMemory(numbers);
            }

            public Memory<T> Memory { get; }

            internal override Span<byte> Bytes => MemoryMarshal.AsBytes(Memory.Span);

            public override EdificeTensor Reshape(params long[] shape) => new Held<T>(Memory, shape);

            internal override OrtValue ToOrtValue()
            {
                return OrtValue.CreateTensorValueFromMemory(OrtMemoryInfo.DefaultInstance, Memory, Shape);
            }
        }
    }

    /// <summary>The types that tensors may have.</summary>
    internal static class ElementTypes
    {
        private static readonly (string Name, TensorElementType Type, Type Managed, int Bytes)[] Known =
        {
            ("float32", TensorElementType.Float, typeof(float), 4),
            ("float16", TensorElementType.Float16, typeof(Float16), 2),
            ("int64", TensorElementType.Int64, typeof(long), 8),
            ("int32", TensorElementType.Int32, typeof(int), 4),
            ("bool", TensorElementType.Bool, typeof(bool), 1),
        };

        public static string All => string.Join(", ", Known.Select(each => each.Name));

        /// <summary>Null of a name that is none of theirs.</summary>
        public static TensorElementType? Parse(string name)
        {
            return Known.Where(each => each.Name == name)
                .Select(each => (TensorElementType?)each.Type).FirstOrDefault();
        }

        public static TensorElementType Of(Type managed)
        {
            return Known.Any(each => each.Managed == managed)
                ? Known.First(each => each.Managed == managed).Type
                : throw new ArgumentException($"a tensor holds {All}, and not {managed.Name}");
        }

        public static string Name(TensorElementType type)
        {
            return Known.Where(each => each.Type == type).Select(each => each.Name).FirstOrDefault() ?? type.ToString();
        }

        /// <summary>Bytes of a number; 0 of a type that is none of these.</summary>
        public static int Bytes(TensorElementType type)
        {
            foreach ((string _, TensorElementType known, Type _, int bytes) in Known)
            {
                if (known == type)
                {
                    return bytes;
                }
            }
            return 0;
        }
    }
}

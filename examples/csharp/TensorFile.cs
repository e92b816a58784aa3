using System;
using System.Collections.Generic;
using System.IO;
using System.Linq;
using Microsoft.ML.OnnxRuntime.Tensors;

namespace Edifice
{
    /// <summary>
    /// A tensor of a .pb file: of ONNX's TensorProto the fields that edifice-export writes, dims (1), data_type (2) and
    /// raw_data (9), little endian. The rest is skipped; a file that keeps its numbers elsewhere is refused.
    /// </summary>
    public static class TensorFile
    {
        /// <exception cref="InvalidDataException">It is not a tensor of one of the types that models take.</exception>
        public static EdificeTensor Read(string path)
        {
            try
            {
                return Parse(File.ReadAllBytes(path));
            }
            catch (InvalidDataException error)
            {
                throw new InvalidDataException($"tensor {path}: {error.Message}; build the bundle again", error);
            }
        }

        private static EdificeTensor Parse(ReadOnlySpan<byte> rest)
        {
            var shape = new List<long>();
            ulong type = 0;
            ReadOnlySpan<byte> data = default;
            while (rest.Length > 0)
            {
                ulong key = Varint(ref rest);
                ulong number = (key & 7) switch
                {
                    0 => Varint(ref rest),
                    1 => 8,
                    2 => Varint(ref rest),
                    5 => 4,
                    _ => throw new InvalidDataException("is not an ONNX TensorProto"),
                };
                ReadOnlySpan<byte> field = (key & 7) == 0 ? default : Take(ref rest, number);
                switch (key)
                {
                    case (1 << 3) | 0:
                        shape.Add((long)number);
                        break;
                    case (1 << 3) | 2:
                        while (field.Length > 0)
                        {
                            shape.Add((long)Varint(ref field));
                        }
                        break;
                    case (2 << 3) | 0:
                        type = number;
                        break;
                    case (9 << 3) | 2:
                        data = field;
                        break;
                }
            }
            // The numbers of ONNX's types are those of TensorElementType.
            int bytes = ElementTypes.Bytes((TensorElementType)type);
            if (type > int.MaxValue || bytes == 0)
            {
                throw new InvalidDataException($"has the type {type}, which is none of {ElementTypes.All}");
            }
            CheckSize(shape, bytes, data.Length);
            EdificeTensor tensor = EdificeTensor.Zeros((TensorElementType)type, shape.ToArray());
            data.CopyTo(tensor.Bytes);
            return tensor;
        }

        private static void CheckSize(List<long> shape, long bytes, long found)
        {
            foreach (long size in shape)
            {
                // Nothing is multiplied that could overflow: sizes and bytes are below 2^31.
                bytes = size < 0 || size > int.MaxValue || bytes > int.MaxValue ? -1 : bytes * size;
                if (bytes < 0)
                {
                    break;
                }
            }
            if (bytes != found)
            {
                string sizes = string.Join(", ", shape.Take(8));
                throw new InvalidDataException($"has the shape [{sizes}] and {found} bytes, which don't agree");
            }
        }

        private static ulong Varint(ref ReadOnlySpan<byte> rest)
        {
            ulong value = 0;
            for (int shift = 0; shift < 64; shift += 7)
            {
                byte part = Take(ref rest, 1)[0];
                value |= (ulong)(part & 127) << shift;
                if (part < 128)
                {
                    return value;
                }
            }
            throw new InvalidDataException("has a number of more than 64 bits");
        }

        private static ReadOnlySpan<byte> Take(ref ReadOnlySpan<byte> rest, ulong length)
        {
            if (length > (ulong)rest.Length)
            {
                throw new InvalidDataException("ends in the middle of a field");
            }
            ReadOnlySpan<byte> taken = rest.Slice(0, (int)length);
            rest = rest.Slice((int)length);
            return taken;
        }
    }
}

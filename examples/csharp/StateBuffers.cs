using System;
using System.IO;
using System.Linq;
using System.Runtime.InteropServices;
using Microsoft.ML.OnnxRuntime;
using Microsoft.ML.OnnxRuntime.Tensors;

namespace Edifice
{
    /// <summary>The state of a stream at one moment, in memory of its own.</summary>
    public sealed class EdificeSnapshot
    {
        internal EdificeSnapshot(string identity, int size) => (Identity, Data) = (identity, new byte[size]);

        /// <summary>Of the bundle that the state belongs to.</summary>
        internal string Identity { get; }

        /// <summary>All states, one after the other.</summary>
        internal byte[] Data { get; }

        /// <summary>Tells this state from all others of the process.</summary>
        internal long Id { get; set; }
    }

    /// <summary>Memory for one value of every state, which ONNX Runtime reads and writes.</summary>
    internal sealed class StateBuffers : IDisposable
    {
        public StateBuffers(Bundle bundle, int batch)
        {
            Values = bundle.States.Select(state => OrtValue.CreateAllocatedTensorValue(
                OrtAllocator.DefaultInstance, state.Tensor.Type, state.Tensor.OfBatch(batch))).ToArray();
        }

        public OrtValue[] Values { get; }

        /// <summary>Tells what it holds from all other states of the process.</summary>
        public long Id { get; set; }

        /// <summary>What every state is before the first frame.</summary>
        public static EdificeSnapshot Initial(Bundle bundle, int batch)
        {
            double size = bundle.States.Sum(state => Size(state.Tensor, batch));
            if (size > int.MaxValue)
            {
                throw new ArgumentException(
                    $"the states of a batch of {batch} take {size / (1 << 30):0} GiB, and a stream may have 2; "
                    + "open several streams of smaller batches");
            }
            var snapshot = new EdificeSnapshot(bundle.Identity, (int)size);
            Span<byte> rest = snapshot.Data;
            foreach (StateSpec state in bundle.States)
            {
                Span<byte> bytes = rest.Slice(0, (int)Size(state.Tensor, batch));
                if (state.InitialFile != null)
                {
                    Span<byte> one = ReadOne(bundle, state).Bytes;
                    for (int entry = 0; entry < batch; entry++)
                    {
                        one.CopyTo(bytes.Slice(entry * one.Length));
                    }
                }
                else if (state.Tensor.Type == TensorElementType.Float)
                {
                    MemoryMarshal.Cast<byte, float>(bytes).Fill((float)state.Initial);
                }
                else if (state.Tensor.Type == TensorElementType.Int64)
                {
                    MemoryMarshal.Cast<byte, long>(bytes).Fill((long)state.Initial);
                }
                else
                {
                    MemoryMarshal.Cast<byte, int>(bytes).Fill((int)state.Initial);
                }
                rest = rest.Slice(bytes.Length);
            }
            return snapshot;
        }

        public void Save(EdificeSnapshot snapshot)
        {
            Span<byte> rest = snapshot.Data;
            foreach (OrtValue value in Values)
            {
                Span<byte> bytes = value.GetTensorMutableRawData();
                bytes.CopyTo(rest);
                rest = rest.Slice(bytes.Length);
            }
            snapshot.Id = Id;
        }

        public void Load(EdificeSnapshot snapshot)
        {
            ReadOnlySpan<byte> rest = snapshot.Data;
            foreach (OrtValue value in Values)
            {
                Span<byte> bytes = value.GetTensorMutableRawData();
                rest.Slice(0, bytes.Length).CopyTo(bytes);
                rest = rest.Slice(bytes.Length);
            }
            Id = snapshot.Id;
        }

        public void Dispose()
        {
            foreach (OrtValue value in Values)
            {
                value.Dispose();
            }
        }

        private static EdificeTensor ReadOne(Bundle bundle, StateSpec state)
        {
            EdificeTensor one = TensorFile.Read(bundle.Check(state.InitialFile!));
            return one.Type == state.Tensor.Type && one.Shape.SequenceEqual(state.Tensor.OfBatch(1))
                ? one
                : throw new InvalidDataException(
                    $"bundle {bundle.Folder}: '{state.InitialFile}' is not a value of the state {state.Tensor.Name}; "
                    + "build or copy the bundle again");
        }

        /// <summary>Bytes, in a type that can't overflow.</summary>
        private static double Size(TensorSpec tensor, int batch)
        {
            double bytes = ElementTypes.Bytes(tensor.Type);
            return tensor.OfBatch(batch).Aggregate(bytes, (product, size) => product * size);
        }
    }
}

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
        internal EdificeSnapshot(string identity) => Identity = identity;

        /// <summary>Of the bundle that the state belongs to.</summary>
        internal string Identity { get; }

        /// <summary>All states, one after the other.</summary>
        internal byte[] Data { get; private set; } = { };

        /// <summary>Frames that states which grow are of.</summary>
        internal long Past { get; private set; }

        /// <summary>Tells this state from all others of the process.</summary>
        internal long Id { get; set; }

        /// <summary>Makes room for the states after so many frames. What was there may be lost.</summary>
        /// <exception cref="ArgumentException">An array can't hold them.</exception>
        internal void Resize(Bundle bundle, int batch, long past)
        {
            double size = StateBuffers.Size(bundle, batch, past);
            if (size > int.MaxValue)
            {
                throw new ArgumentException(
                    $"the states of a batch of {batch} take {size / (1 << 30):0} GiB, and a snapshot may have 2; "
                    + "open several streams of smaller batches");
            }
            Past = past;
            if (Data.Length != (int)size)
            {
                Data = new byte[(int)size];
            }
        }
    }

    /// <summary>
    /// Memory for one value of every state, which ONNX Runtime reads and writes; new memory for those that grow.
    /// </summary>
    internal sealed class StateBuffers : IDisposable
    {
        private readonly Bundle bundle;
        private readonly int batch;

        public StateBuffers(Bundle bundle, int batch)
        {
            (this.bundle, this.batch) = (bundle, batch);
            Values = bundle.States.Select(Allocate).ToArray();
        }

        public OrtValue[] Values { get; }

        /// <summary>Frames that states which grow are of.</summary>
        public long Past { get; private set; }

        /// <summary>Tells what it holds from all other states of the process.</summary>
        public long Id { get; set; }

        /// <summary>What every state is before the first frame.</summary>
        public static EdificeSnapshot Initial(Bundle bundle, int batch)
        {
            var snapshot = new EdificeSnapshot(bundle.Identity);
            snapshot.Resize(bundle, batch, 0);
            Span<byte> rest = snapshot.Data;
            foreach (StateSpec state in bundle.States)
            {
                Span<byte> bytes = rest.Slice(0, (int)Size(state.Tensor, batch, 0));
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

        /// <summary>Bytes of all states after so many frames, in a type that can't overflow. It allocates none.</summary>
        public static double Size(Bundle bundle, int batch, long past)
        {
            double bytes = 0;
            for (int i = 0; i < bundle.States.Count; i++)
            {
                bytes += Size(bundle.States[i].Tensor, batch, past);
            }
            return bytes;
        }

        /// <summary>Makes room for what is there after so many frames; what states that grow held is lost.</summary>
        public void Grow(long past)
        {
            if (past == Past)
            {
                return;
            }
            Past = past;
            for (int i = 0; i < Values.Length; i++)
            {
                if (bundle.States[i].Grows)
                {
                    OrtValue longer = Allocate(bundle.States[i]);
                    Values[i].Dispose();
                    Values[i] = longer;
                }
            }
        }

        public void Save(EdificeSnapshot snapshot)
        {
            snapshot.Resize(bundle, batch, Past);
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
            Grow(snapshot.Past);
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

        private static double Size(TensorSpec tensor, int batch, long past)
        {
            double bytes = ElementTypes.Bytes(tensor.Type);
            foreach (Size size in tensor.Shape)
            {
                bytes *= size.Symbol == null ? size.Number : size.IsPast ? past : batch;
            }
            return bytes;
        }

        private OrtValue Allocate(StateSpec state)
        {
            return OrtValue.CreateAllocatedTensorValue(
                OrtAllocator.DefaultInstance, state.Tensor.Type, state.Tensor.OfBatch(batch, Past));
        }
    }
}

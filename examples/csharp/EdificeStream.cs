using System;
using System.Linq;
using System.Runtime.InteropServices;
using System.Threading;
using Microsoft.ML.OnnxRuntime;

namespace Edifice
{
    /// <summary>
    /// Frame by frame: one frame in, one output out, and a state that can be saved, restored and rewound. One thread at
    /// a time; different streams of a model may run in different threads.
    /// </summary>
    /// <remarks>
    /// The states are in a ring: a step reads slot i and writes slot i + 1, so nothing is updated in place, and going
    /// back is a change of the index. What a step reads and writes is bound once for each pair of neighbours: on the
    /// CPU it makes no managed object.
    /// </remarks>
    public sealed class EdificeStream : IDisposable
    {
        private const string Stays = ", and the stream stays where it was";

        private static long lastId;

        private readonly EdificeModel model;
        private readonly GraphSpec graph;
        private readonly InferenceSession session;
        private readonly RunOptions run = EdificeModel.QuietRun();
        private readonly float[] frame;
        private readonly float[] output;
        private readonly OrtValue frameValue;
        private readonly OrtValue outputValue;
        private readonly StateBuffers[] slots;
        private readonly OrtIoBinding[] bindings; // the one at i reads slot i
        private readonly EdificeSnapshot initial;
        private int current;
        private bool disposed;

        internal EdificeStream(EdificeModel model, int batch, int history)
        {
            if (batch < 1 || history < 0 || history > 100_000)
            {
                throw new ArgumentException(
                    $"a stream has a batch from 1 and a history from 0 to 100000, got {batch} and {history}");
            }
            (this.model, Batch, History) = (model, batch, history);
            graph = model.Bundle.Graph("stream");
            session = model.Session("stream");
            initial = StateBuffers.Initial(model.Bundle, batch);
            frame = new float[checked(batch * model.EmbedDim)];
            output = new float[checked(batch * model.HiddenSize)];
            frameValue = OrtValue.CreateTensorValueFromMemory(frame, new long[] { batch, model.EmbedDim });
            outputValue = OrtValue.CreateTensorValueFromMemory(output, new long[] { batch, model.HiddenSize });
            int count = Math.Max(2, history + 1);
            slots = Enumerable.Range(0, count).Select(_ => new StateBuffers(model.Bundle, batch)).ToArray();
            bindings = Enumerable.Range(0, count).Select(_ => session.CreateIoBinding()).ToArray();
            for (int i = 0; i < count; i++)
            {
                Bind(bindings[i], graph, frameValue, slots[i], slots[(i + 1) % count]);
            }
            Reset();
        }

        public int Batch { get; }

        /// <summary>Frames that it can be rewound by at most.</summary>
        public int History { get; }

        /// <summary>Frames that it can be rewound by now.</summary>
        public int Rewindable { get; private set; }

        /// <summary>One frame on.</summary>
        /// <param name="numbers">float32 [batch, EmbedDim].</param>
        /// <returns>float32 [batch, HiddenSize], valid until the next call.</returns>
        /// <exception cref="ArgumentException">Other than so many, a NaN, or one beyond MaxMagnitude.</exception>
        /// <exception cref="System.IO.InvalidDataException">The output is not finite.</exception>
        /// <remarks>After either the stream is where it was.</remarks>
        public ReadOnlySpan<float> Step(ReadOnlySpan<float> numbers)
        {
            CheckDisposed();
            if (numbers.Length != frame.Length)
            {
                throw new ArgumentException(
                    $"frame has {numbers.Length} numbers, and the model takes {frame.Length} "
                    + $"(float32 [{Batch}, {model.EmbedDim}]); give one frame for each stream of the batch");
            }
            EdificeModel.CheckNumbers("frame", numbers);
            numbers.CopyTo(frame);
            int next = BeginWrite();
            if (model.Provider == "cpu")
            {
                session.RunWithBinding(run, bindings[current]);
            }
            else
            {
                // Another provider may copy an input when it is bound, and then reads that copy at every run.
                Bind(bindings[current], graph, frameValue, slots[current], slots[next]);
                session.RunWithBinding(run, bindings[current]);
                bindings[current].SynchronizeBoundOutputs();
            }
            EdificeModel.CheckOutput(output, Stays);
            EndWrite(next);
            return output;
        }

        /// <summary>
        /// Many frames on at once: the numbers of as many steps, to rounding, in less time. Rewinding goes back over
        /// all of them as over one frame.
        /// </summary>
        /// <param name="frames">float32 [batch, sequence, EmbedDim]; the sequence is what their number gives.</param>
        /// <returns>The output at the last frame, float32 [batch, HiddenSize], valid until the next call.</returns>
        /// <exception cref="ArgumentException">No whole frames, a NaN, or a number beyond MaxMagnitude.</exception>
        /// <exception cref="System.IO.InvalidDataException">The output is not finite.</exception>
        /// <remarks>After either the stream is where it was.</remarks>
        public ReadOnlySpan<float> Prefill(ReadOnlyMemory<float> frames)
        {
            CheckDisposed();
            GraphSpec prefillGraph = model.Bundle.Graph("prefill");
            InferenceSession prefill = model.Session("prefill");
            long[] shape = EdificeModel.SequenceShape(prefillGraph, frames.Span, Batch);
            using OrtValue sequence = OrtValue.CreateTensorValueFromMemory(
                OrtMemoryInfo.DefaultInstance, MemoryMarshal.AsMemory(frames), shape);
            using OrtIoBinding binding = prefill.CreateIoBinding();
            int next = BeginWrite();
            Bind(binding, prefillGraph, sequence, slots[current], slots[next]);
            prefill.RunWithBinding(run, binding);
            binding.SynchronizeBoundOutputs();
            EdificeModel.CheckOutput(output, Stays);
            EndWrite(next);
            return output;
        }

        /// <summary>Back to before the first frame; there is nothing to rewind then.</summary>
        public void Reset()
        {
            CheckDisposed();
            initial.Id = Interlocked.Increment(ref lastId);
            slots[current].Load(initial);
            Rewindable = 0;
        }

        /// <summary>Copies the state.</summary>
        /// <param name="reuse">A snapshot that is no longer needed, to take its memory.</param>
        public EdificeSnapshot Snapshot(EdificeSnapshot? reuse = null)
        {
            CheckDisposed();
            EdificeSnapshot snapshot = reuse ?? new EdificeSnapshot(initial.Weights, initial.Data.Length);
            CheckFits(snapshot);
            slots[current].Save(snapshot);
            return snapshot;
        }

        /// <summary>
        /// Goes to a snapshot of this stream, or of another of the same bundle and batch: what comes next is bitwise
        /// what came after it. Frames from before it can still be rewound if it is in the history.
        /// </summary>
        public void Restore(EdificeSnapshot snapshot)
        {
            CheckDisposed();
            CheckFits(snapshot);
            for (int back = 0; back <= Rewindable; back++)
            {
                if (slots[Back(back)].Id == snapshot.Id)
                {
                    Rewind(back);
                    return;
                }
            }
            slots[current].Load(snapshot);
            Rewindable = 0;
        }

        /// <summary>Back by a number of frames.</summary>
        /// <exception cref="ArgumentException">More than Rewindable.</exception>
        public void Rewind(int frames)
        {
            CheckDisposed();
            if (frames < 0 || frames > Rewindable)
            {
                throw new ArgumentException(
                    $"can't rewind {frames} frames: the history holds {Rewindable}, of at most {History}; "
                    + "open the stream with a larger history, or keep snapshots");
            }
            current = Back(frames);
            Rewindable -= frames;
        }

        /// <summary>Frees the states.</summary>
        public void Dispose()
        {
            if (disposed)
            {
                return;
            }
            disposed = true;
            foreach (OrtIoBinding binding in bindings)
            {
                binding.Dispose();
            }
            foreach (StateBuffers slot in slots)
            {
                slot.Dispose();
            }
            frameValue.Dispose();
            outputValue.Dispose();
            run.Dispose();
        }

        private int Back(int frames) => (current - frames + slots.Length) % slots.Length;

        /// <summary>The slot to write to. What it held leaves the history even if the run fails.</summary>
        private int BeginWrite()
        {
            Rewindable = Math.Min(Rewindable, slots.Length - 2);
            return (current + 1) % slots.Length;
        }

        private void EndWrite(int next)
        {
            current = next;
            slots[next].Id = Interlocked.Increment(ref lastId);
            Rewindable = Math.Min(Rewindable + 1, History);
        }

        private void Bind(
            OrtIoBinding binding, GraphSpec bound, OrtValue frames, StateBuffers past, StateBuffers present)
        {
            binding.BindInput(bound.Inputs[0].Name, frames);
            binding.BindOutput(bound.Outputs[0].Name, outputValue);
            for (int i = 0; i < past.Values.Length; i++)
            {
                binding.BindInput(model.Bundle.States[i].Past, past.Values[i]);
                binding.BindOutput(model.Bundle.States[i].Present, present.Values[i]);
            }
        }

        private void CheckFits(EdificeSnapshot snapshot)
        {
            if (snapshot.Weights != initial.Weights || snapshot.Data.Length != initial.Data.Length)
            {
                throw new ArgumentException(
                    $"the snapshot is of weights {snapshot.Weights.Substring(0, 12)} and {snapshot.Data.Length} bytes, "
                    + $"and the stream of {initial.Weights.Substring(0, 12)} and {initial.Data.Length}; restore it in "
                    + "a stream of the same bundle and batch");
            }
        }

        private void CheckDisposed()
        {
            if (disposed || model.IsDisposed)
            {
                throw new ObjectDisposedException(nameof(EdificeStream));
            }
        }
    }
}

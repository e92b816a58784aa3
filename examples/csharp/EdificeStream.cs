using System;
using System.Collections.Generic;
using System.Linq;
using System.Runtime.InteropServices;
using Microsoft.ML.OnnxRuntime;

namespace Edifice
{
    /// <summary>
    /// Frame by frame: one frame in, its outputs out, and a state that can be saved, restored and rewound. One thread
    /// at a time; different streams of a model may run in different threads.
    /// </summary>
    /// <remarks>
    /// What a step reads and writes is bound once for each pair of neighbours of the ring of states: on the CPU it
    /// makes no managed object. Where states grow it is bound at every step, to new memory for them.
    /// </remarks>
    public sealed class EdificeStream : IDisposable
    {
        private const string Stays = ", and the stream stays where it was";
        private const int Piece = 1024; // frames of a prefill that are computed at once, unless the window is longer

        private readonly EdificeModel model;
        private readonly GraphSpec graph;
        private readonly InferenceSession session;
        private readonly RunOptions run = EdificeModel.QuietRun();
        private readonly StateRing states;
        private readonly EdificeTensor[] frame;
        private readonly EdificeTensor[] outputs;
        private readonly OrtValue[] frameValues;
        private readonly OrtValue[] outputValues;
        private readonly OrtIoBinding[] bindings; // the one at i reads the ring's slot i
        private readonly bool grows;
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
            states = new StateRing(model.Bundle, batch, history);
            grows = model.Bundle.States.Any(state => state.Grows);
            frame = graph.OwnInputs.Select(spec => EdificeTensor.Zeros(spec.Type, spec.OfBatch(batch))).ToArray();
            outputs = graph.OwnOutputs.Select(spec => EdificeTensor.Zeros(spec.Type, spec.OfBatch(batch))).ToArray();
            frameValues = frame.Select(tensor => tensor.ToOrtValue()).ToArray();
            outputValues = outputs.Select(tensor => tensor.ToOrtValue()).ToArray();
            bindings = Enumerable.Range(0, states.Count).Select(_ => session.CreateIoBinding()).ToArray();
            for (int i = 0; i < bindings.Length; i++)
            {
                Bind(bindings[i], graph, frameValues, states[i], states[i + 1]);
            }
        }

        public int Batch { get; }

        /// <summary>Frames that it can be rewound by at most.</summary>
        public int History { get; }

        /// <summary>Frames that it can be rewound by now.</summary>
        public int Rewindable => states.Rewindable;

        /// <summary>One frame on.</summary>
        /// <param name="inputs">
        /// One tensor for each of `Bundle.Graph("stream").OwnInputs`, in their order, with Batch as its first size.
        /// </param>
        /// <returns>One for each of its OwnOutputs, in their order, valid until the next call.</returns>
        /// <exception cref="ArgumentException">
        /// Another number of tensors, type or shape, a NaN, a number beyond MaxMagnitude, or an id that there is not.
        /// </exception>
        /// <exception cref="System.IO.InvalidDataException">An output is not finite.</exception>
        /// <remarks>After either the stream is where it was.</remarks>
        public IReadOnlyList<EdificeTensor> Step(params EdificeTensor[] inputs)
        {
            CheckDisposed();
            TensorCheck.Number("a step", graph.OwnInputs, inputs.Length);
            for (int i = 0; i < inputs.Length; i++)
            {
                TensorCheck.Kind(graph.OwnInputs[i], inputs[i]);
                CheckBatch(graph.OwnInputs[i], inputs[i]);
                TensorCheck.Numbers(graph.OwnInputs[i], frame[i].Shape, inputs[i].Bytes);
                inputs[i].Bytes.CopyTo(frame[i].Bytes);
            }
            Advance();
            return outputs;
        }

        /// <summary>One frame on, of one float32 input and one float32 output.</summary>
        /// <param name="numbers">Such as float32 [batch, EmbedDim].</param>
        /// <returns>The output's numbers, such as float32 [batch, HiddenSize], valid until the next call.</returns>
        /// <exception cref="ArgumentException">As above; or a stream of other inputs and outputs.</exception>
        public ReadOnlySpan<float> Step(ReadOnlySpan<float> numbers)
        {
            CheckDisposed();
            TensorCheck.Numbers(graph.OnlyFloats(), frame[0].Shape, MemoryMarshal.AsBytes(numbers));
            numbers.CopyTo(frame[0].Numbers<float>());
            Advance();
            return outputs[0].Numbers<float>();
        }

        /// <summary>
        /// Many frames on at once: the numbers of as many steps, to rounding, in less time. Rewinding goes back over
        /// all of them as over one frame.
        /// </summary>
        /// <param name="inputs">
        /// One tensor for each of `Bundle.Graph("prefill").OwnInputs`, in their order, with Batch as its first size.
        /// </param>
        /// <returns>The outputs at the last frame, as of a step, valid until the next call.</returns>
        /// <exception cref="ArgumentException">As of a step; or sizes that should be equal and differ.</exception>
        /// <exception cref="NotSupportedException">The bundle has no prefill graph.</exception>
        /// <exception cref="System.IO.InvalidDataException">An output is not finite.</exception>
        /// <remarks>After each of them the stream is where it was.</remarks>
        public IReadOnlyList<EdificeTensor> Prefill(params EdificeTensor[] inputs)
        {
            CheckDisposed();
            GraphSpec prefill = model.Bundle.Graph("prefill");
            // Of frames there may be any number: they are computed in pieces.
            string frames = model.Bundle.Frames ?? "";
            TensorCheck.Inputs("a prefill", prefill, prefill.OwnInputs, inputs, unlimited: frames);
            for (int i = 0; i < inputs.Length; i++)
            {
                CheckBatch(prefill.OwnInputs[i], inputs[i]);
            }
            int length = (int)inputs[0].Shape[1];
            int most = Math.Max(Piece, model.Bundle.WindowSize);
            most = prefill.Limits.TryGetValue(frames, out (int Least, int? Most) limit)
                ? Math.Min(most, limit.Most ?? most)
                : most;
            int pieces = (length + most - 1) / most;
            StateBuffers next = states.Begin();
            using StateBuffers? other = pieces > 1 ? new StateBuffers(model.Bundle, Batch) : null;
            StateBuffers past = states[states.Now];
            for (int piece = 0; piece < pieces; piece++)
            {
                // By turns, so that the last piece writes to the next slot, and none to what it reads.
                StateBuffers present = (pieces - piece) % 2 == 1 ? next : other!;
                int start = piece * most, count = Math.Min(most, length - start);
                present.Grow(past.Past + count);
                RunPiece(prefill, pieces == 1 ? inputs : Part(inputs, start, count), past, present);
                past = present;
            }
            states.End();
            return outputs;
        }

        /// <summary>Many frames on at once, of one float32 input and one float32 output.</summary>
        /// <param name="frames">
        /// Such as float32 [batch, sequence, EmbedDim]; the sequence is what their number gives.
        /// </param>
        /// <returns>
        /// The output's numbers at the last frame, such as float32 [batch, HiddenSize], valid until the next call.
        /// </returns>
        /// <exception cref="ArgumentException">As above; or a stream of other inputs and outputs.</exception>
        public ReadOnlySpan<float> Prefill(ReadOnlyMemory<float> frames)
        {
            CheckDisposed();
            return Prefill(EdificeModel.Sequence(model.Bundle.Graph("prefill"), frames, Batch))[0].Numbers<float>();
        }

        /// <summary>Back to before the first frame; there is nothing to rewind then.</summary>
        public void Reset()
        {
            CheckDisposed();
            states.Reset();
        }

        /// <summary>Copies the state.</summary>
        /// <param name="reuse">A snapshot that is no longer needed, to take its memory.</param>
        public EdificeSnapshot Snapshot(EdificeSnapshot? reuse = null)
        {
            CheckDisposed();
            return states.Save(reuse);
        }

        /// <summary>
        /// Goes to a snapshot of this stream, or of another of the same bundle and batch: what comes next is bitwise
        /// what came after it. Frames from before it can still be rewound if it is in the history.
        /// </summary>
        /// <exception cref="ArgumentException">It is of another bundle or batch.</exception>
        public void Restore(EdificeSnapshot snapshot)
        {
            CheckDisposed();
            states.Restore(snapshot);
        }

        /// <summary>Back by a number of frames.</summary>
        /// <exception cref="ArgumentException">More than Rewindable.</exception>
        public void Rewind(int frames)
        {
            CheckDisposed();
            states.Rewind(frames);
        }

        /// <summary>Frees the states.</summary>
        public void Dispose()
        {
            if (disposed)
            {
                return;
            }
            disposed = true;
            DisposeAll(bindings);
            states.Dispose();
            DisposeAll(frameValues);
            DisposeAll(outputValues);
            run.Dispose();
        }

        private static void DisposeAll(IEnumerable<IDisposable> all)
        {
            foreach (IDisposable each in all)
            {
                each.Dispose();
            }
        }

        private static EdificeTensor[] Part(EdificeTensor[] inputs, int start, int count)
        {
            return inputs.Select(input => input.Part(start, count)).ToArray();
        }

        private void Advance()
        {
            StateBuffers next = states.Begin();
            OrtIoBinding binding = bindings[states.Now];
            next.Grow(states[states.Now].Past + 1);
            if (model.Provider == "cpu" && !grows)
            {
                session.RunWithBinding(run, binding);
            }
            else
            {
                // Another provider may copy an input when it is bound, and then reads that copy at every run.
                Bind(binding, graph, frameValues, states[states.Now], next);
                session.RunWithBinding(run, binding);
                binding.SynchronizeBoundOutputs();
            }
            CheckOutputs();
            states.End();
        }

        private void RunPiece(GraphSpec prefill, EdificeTensor[] inputs, StateBuffers past, StateBuffers present)
        {
            OrtValue[] values = inputs.Select(input => input.ToOrtValue()).ToArray();
            try
            {
                InferenceSession prefillSession = model.Session("prefill");
                using OrtIoBinding binding = prefillSession.CreateIoBinding();
                Bind(binding, prefill, values, past, present);
                prefillSession.RunWithBinding(run, binding);
                binding.SynchronizeBoundOutputs();
            }
            finally
            {
                DisposeAll(values);
            }
            CheckOutputs();
        }

        private void Bind(
            OrtIoBinding binding, GraphSpec bound, OrtValue[] inputs, StateBuffers past, StateBuffers present)
        {
            for (int i = 0; i < inputs.Length; i++)
            {
                binding.BindInput(bound.OwnInputs[i].Name, inputs[i]);
            }
            for (int i = 0; i < outputValues.Length; i++)
            {
                binding.BindOutput(bound.OwnOutputs[i].Name, outputValues[i]);
            }
            for (int i = 0; i < past.Values.Length; i++)
            {
                binding.BindInput(model.Bundle.States[i].Past, past.Values[i]);
                binding.BindOutput(model.Bundle.States[i].Present, present.Values[i]);
            }
        }

        private void CheckOutputs()
        {
            for (int i = 0; i < outputs.Length; i++)
            {
                TensorCheck.Finite(graph.OwnOutputs[i], outputs[i], Stays);
            }
        }

        private void CheckBatch(InputSpec spec, EdificeTensor given)
        {
            if (given.Shape[0] != Batch)
            {
                throw new ArgumentException(
                    $"{spec.Name} has a {spec.Shape[0]} of {given.Shape[0]}, and the stream one of {Batch}; "
                    + "give an entry for each stream");
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

using System;
using System.Collections.Generic;
using System.Diagnostics;
using System.IO;
using System.Linq;
using System.Runtime.InteropServices;
using Microsoft.ML.OnnxRuntime;

namespace Edifice
{
    /// <summary>What the check found of one graph.</summary>
    public sealed class GraphReport
    {
        public GraphReport(string graph) => Graph = graph;

        public string Graph { get; }

        /// <summary>Tensors that were compared.</summary>
        public int Tensors { get; set; }

        /// <summary>The largest error of them.</summary>
        public double Error { get; set; }

        /// <summary>Milliseconds of a frame, or of a window of frames.</summary>
        public (double P50, double P99, double Max) Times { get; set; }

        /// <summary>Bytes of managed memory that a call left to the garbage collector.</summary>
        public double Bytes { get; set; }
    }

    /// <summary>Compares what the library computes with the test data of the bundle.</summary>
    public sealed class SelfCheck
    {
        private const double Limit = 1e-5;
        private const int Rollbacks = 20;
        private const int History = 6; // less than a rollback may go back, so both ways of restoring are taken

        private readonly EdificeModel model;
        private readonly int frames;
        private readonly Random random = new Random(1);

        public SelfCheck(EdificeModel model, int frames) => (this.model, this.frames) = (model, frames);

        public List<GraphReport> Graphs { get; } = new List<GraphReport>();
        public int RolledBack { get; private set; }

        /// <summary>The message by which a frame that is too wide was refused.</summary>
        public string Refused { get; private set; } = "";

        /// <summary>What is wrong; null if nothing is.</summary>
        public string? Problem { get; private set; }

        public void Run()
        {
            model.Bundle.CheckAll();
            foreach (string graph in model.Bundle.Graphs)
            {
                CheckGraph(graph);
            }
            if (!model.Bundle.Has("stream"))
            {
                Refuse(() => model.Run(new float[model.EmbedDim + 1]));
                return;
            }
            using EdificeStream stream = model.OpenStream(1, History);
            float[] frame = RandomFrames(1);
            float[] expected = stream.Step(frame).ToArray();
            stream.Reset();
            Refuse(() => stream.Step(new float[model.EmbedDim + 1]));
            Expect(Numbers.Same(stream.Step(frame), expected), "the stream moved when it refused a frame");
            CheckRollback(stream);
        }

        private void CheckGraph(string name)
        {
            var report = new GraphReport(name);
            Graphs.Add(report);
            GraphSpec graph = model.Bundle.Graph(name);
            InferenceSession session = model.Session(name);
            foreach (string folder in graph.TestData)
            {
                RunTestData(report, graph, session, folder);
            }
            if (graph.TestSequence != null)
            {
                RunTestSequence(report, graph.TestSequence);
            }
            Expect(
                report.Error <= Limit,
                $"the {name} graph differs from its test data by {report.Error:0.0e+00}, and {Limit:0e+00} may be");
            float[] window = RandomFrames(model.Bundle.WindowSize);
            int windows = Math.Max(20, frames / 50);
            if (name == "window")
            {
                Measure(report, windows, _ => model.Run(window));
                return;
            }
            using EdificeStream stream = model.OpenStream(1, 16);
            if (name == "prefill")
            {
                Measure(report, windows, _ => stream.Prefill(window));
                return;
            }
            int width = model.EmbedDim;
            Measure(report, frames, i => stream.Step(window.AsSpan(i % model.Bundle.WindowSize * width, width)));
        }

        /// <summary>The graph as it is: all its inputs from files, all its outputs compared.</summary>
        private void RunTestData(GraphReport report, GraphSpec graph, InferenceSession session, string folder)
        {
            OrtValue[] inputs = Enumerable.Range(0, graph.Inputs.Length)
                .Select(i => Read($"{folder}/input_{i}.pb").ToOrtValue()).ToArray();
            using var run = new RunOptions();
            using IDisposableReadOnlyCollection<OrtValue> outputs = session.Run(
                run, graph.Inputs.Select(input => input.Name).ToArray(), inputs,
                graph.Outputs.Select(output => output.Name).ToArray());
            for (int i = 0; i < outputs.Count; i++)
            {
                Add(report, Numbers.Error(outputs[i], Read($"{folder}/output_{i}.pb")));
            }
            foreach (OrtValue input in inputs)
            {
                input.Dispose();
            }
        }

        /// <summary>Frames from the initial state on: the library's steps, and its prefill.</summary>
        private void RunTestSequence(GraphReport report, string folder)
        {
            TensorFile inputs = Read($"{folder}/input_0.pb");
            TensorFile expected = Read($"{folder}/output_0.pb");
            if (inputs.Shape.Length != 3 || expected.Shape.Length != 3
                || inputs.Shape[2] != model.EmbedDim || expected.Shape[2] != model.HiddenSize
                || !inputs.Shape.Take(2).SequenceEqual(expected.Shape.Take(2)))
            {
                throw new InvalidDataException(
                    $"{folder}: has frames and outputs that don't fit; build or copy the bundle again");
            }
            (int batch, int length) = ((int)inputs.Shape[0], (int)inputs.Shape[1]);
            float[] sequence = MemoryMarshal.Cast<byte, float>(inputs.Data).ToArray();
            float[] outputs = MemoryMarshal.Cast<byte, float>(expected.Data).ToArray();
            using EdificeStream stream = model.OpenStream(batch, 1);
            var computed = new float[outputs.Length];
            for (int i = 0; i < length; i++)
            {
                Numbers.Scatter(stream.Step(Numbers.Gather(sequence, batch, length, i)), computed, batch, length, i);
            }
            Add(report, Numbers.Error(computed, outputs));
            stream.Reset();
            float[] last = stream.Prefill(sequence).ToArray();
            Add(report, Numbers.Error(last, Numbers.Gather(outputs, batch, length, length - 1)));
        }

        private void CheckRollback(EdificeStream stream)
        {
            EdificeSnapshot? snapshot = null;
            using EdificeStream other = model.OpenStream(1, 0);
            bool same = true;
            for (RolledBack = 0; RolledBack < Rollbacks && same; RolledBack++)
            {
                for (int wait = random.Next(1, 20); wait > 0; wait--)
                {
                    stream.Step(RandomFrames(1));
                }
                snapshot = stream.Snapshot(snapshot);
                int count = random.Next(1, 2 * History);
                float[][] inputs = Enumerable.Range(0, count).Select(_ => RandomFrames(1)).ToArray();
                float[][] outputs = inputs.Select(frame => stream.Step(frame).ToArray()).ToArray();
                stream.Restore(snapshot);
                other.Restore(snapshot);
                for (int i = 0; i < count; i++)
                {
                    same &= Numbers.Same(stream.Step(inputs[i]), outputs[i]);
                    same &= Numbers.Same(other.Step(inputs[i]), outputs[i]);
                }
                int back = Math.Min(stream.Rewindable, count);
                stream.Rewind(back);
                for (int i = count - back; i < count; i++)
                {
                    same &= Numbers.Same(stream.Step(inputs[i]), outputs[i]);
                }
            }
            Expect(same, "the same frames gave other outputs after a rollback");
        }

        private void Refuse(Action call)
        {
            try
            {
                call();
                Expect(false, "a frame that is one too wide was not refused");
            }
            catch (ArgumentException error)
            {
                Refused = error.Message;
            }
        }

        private delegate void Call(int index);

        private static void Measure(GraphReport report, int calls, Call call)
        {
            for (int i = 0; i < 20; i++)
            {
                call(i);
            }
            var ticks = new long[calls];
            long bytes = GC.GetAllocatedBytesForCurrentThread();
            for (int i = 0; i < calls; i++)
            {
                long start = Stopwatch.GetTimestamp();
                call(i);
                ticks[i] = Stopwatch.GetTimestamp() - start;
            }
            report.Bytes = (GC.GetAllocatedBytesForCurrentThread() - bytes) / (double)calls;
            report.Times = Numbers.Percentiles(ticks);
        }

        private static void Add(GraphReport report, double error)
        {
            report.Tensors++;
            report.Error = Math.Max(report.Error, error);
        }

        private float[] RandomFrames(int count)
        {
            IEnumerable<int> places = Enumerable.Range(0, count * model.EmbedDim);
            return places.Select(_ => (float)(2 * random.NextDouble() - 1)).ToArray();
        }

        private TensorFile Read(string name) => TensorFile.Read(model.Bundle.Check(name));

        private void Expect(bool holds, string problem)
        {
            if (!holds)
            {
                Problem ??= problem;
            }
        }
    }
}

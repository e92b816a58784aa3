using System;
using System.Collections.Generic;
using System.Diagnostics;
using System.IO;
using System.Linq;

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

        /// <summary>The message by which an input with a number too few was refused.</summary>
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
                EdificeTensor[] inputs = Draw(model.Bundle.Graph("window").OwnInputs);
                Refuse(() => model.Run(WithoutANumber(inputs)));
                return;
            }
            using EdificeStream stream = model.OpenStream(1, History);
            EdificeTensor[] frame = RandomFrame(1);
            EdificeTensor[] expected = Numbers.Copy(stream.Step(frame));
            stream.Reset();
            Refuse(() => stream.Step(WithoutANumber(frame)));
            Expect(Numbers.Same(stream.Step(frame), expected), "the stream moved when it refused a frame");
            CheckRollback(stream);
        }

        private void CheckGraph(string name)
        {
            var report = new GraphReport(name);
            Graphs.Add(report);
            GraphSpec graph = model.Bundle.Graph(name);
            try
            {
                foreach (string folder in graph.TestData)
                {
                    Compare(report, model.RunGraph(name, Read(folder, "input", graph.Inputs.Length)), folder);
                }
                if (graph.TestSequence != null)
                {
                    RunTestSequence(report, graph, graph.TestSequence);
                }
            }
            catch (ArgumentException error)
            {
                throw new InvalidDataException(
                    $"bundle {model.Bundle.Folder}: test data of the {name} graph is refused: {error.Message}", error);
            }
            Expect(
                report.Error <= Limit,
                $"the {name} graph differs from its test data by {report.Error:0.0e+00}, and {Limit:0e+00} may be");
            Time(report, graph);
        }

        /// <summary>How long a call takes of the sizes that the graph is made for.</summary>
        private void Time(GraphReport report, GraphSpec graph)
        {
            EdificeTensor[] inputs = Draw(graph.OwnInputs);
            int calls = Math.Max(20, frames / 50);
            if (report.Graph == "window")
            {
                Measure(report, calls, _ => model.Run(inputs));
                return;
            }
            int batch = (int)inputs[0].Shape[0];
            using EdificeStream stream = model.OpenStream(batch, 16);
            EdificeTensor[][] several = Enumerable.Range(0, 60).Select(_ => RandomFrame(batch)).ToArray();
            if (model.Bundle.States.Any(state => state.Grows))
            {
                // Each call is that after a window's frames; going back by one copies nothing.
                for (int i = 0; i < model.Bundle.WindowSize; i++)
                {
                    stream.Step(several[i % several.Length]);
                }
                bool prefills = report.Graph == "prefill";
                Measure(report, prefills ? calls : frames, i =>
                {
                    _ = prefills ? stream.Prefill(inputs) : stream.Step(several[i % several.Length]);
                    stream.Rewind(1);
                });
                return;
            }
            if (report.Graph == "prefill")
            {
                Measure(report, calls, _ => stream.Prefill(inputs));
                return;
            }
            Measure(report, frames, i => stream.Step(several[i % several.Length]));
        }

        /// <summary>Frames from the initial state on: the library's steps, and its prefill if it has one.</summary>
        private void RunTestSequence(GraphReport report, GraphSpec graph, string folder)
        {
            EdificeTensor[] inputs = Read(folder, "input", graph.OwnInputs.Length);
            EdificeTensor[] expected = Read(folder, "output", graph.OwnOutputs.Length);
            EdificeTensor[] all = inputs.Concat(expected).ToArray();
            if (all.Any(tensor => tensor.Shape.Length < 2 || !tensor.Shape.Take(2).SequenceEqual(all[0].Shape.Take(2))))
            {
                throw new InvalidDataException(
                    $"{folder}: has frames and outputs that don't fit; build or copy the bundle again");
            }
            (int batch, int length) = ((int)all[0].Shape[0], (int)all[0].Shape[1]);
            using EdificeStream stream = model.OpenStream(batch, 1);
            EdificeTensor[] computed = Numbers.Copy(expected);
            for (int i = 0; i < length; i++)
            {
                IReadOnlyList<EdificeTensor> outputs = stream.Step(At(inputs, i));
                for (int j = 0; j < computed.Length; j++)
                {
                    Numbers.Scatter(outputs[j], computed[j], i);
                }
            }
            Compare(report, computed, expected);
            if (model.Bundle.Has("prefill"))
            {
                stream.Reset();
                Compare(report, stream.Prefill(inputs), At(expected, length - 1));
            }
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
                    stream.Step(RandomFrame(1));
                }
                snapshot = stream.Snapshot(snapshot);
                int count = random.Next(1, 2 * History);
                EdificeTensor[][] inputs = Enumerable.Range(0, count).Select(_ => RandomFrame(1)).ToArray();
                EdificeTensor[][] outputs = inputs.Select(frame => Numbers.Copy(stream.Step(frame))).ToArray();
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
                Expect(false, "an input with a number too few was not refused");
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

        private void Compare(GraphReport report, IReadOnlyList<EdificeTensor> found, string folder)
        {
            Compare(report, found, Read(folder, "output", found.Count));
        }

        private static void Compare(
            GraphReport report, IReadOnlyList<EdificeTensor> found, IReadOnlyList<EdificeTensor> expected)
        {
            for (int i = 0; i < expected.Count; i++)
            {
                report.Tensors++;
                report.Error = Math.Max(report.Error, Numbers.Error(found[i], expected[i]));
            }
        }

        /// <summary>The same inputs, the first of which lacks its last number.</summary>
        private static EdificeTensor[] WithoutANumber(EdificeTensor[] inputs)
        {
            long[] shape = inputs[0].Shape;
            long count = shape.Aggregate(1L, (product, size) => product * size);
            return inputs.Skip(1).Prepend(EdificeTensor.Zeros(inputs[0].Type, count - 1).Reshape(shape)).ToArray();
        }

        private static EdificeTensor[] At(EdificeTensor[] sequences, int place)
        {
            return sequences.Select(sequence => Numbers.Gather(sequence, place)).ToArray();
        }

        private EdificeTensor[] Draw(InputSpec[] specs)
        {
            return specs.Select(spec => Numbers.Draw(spec, model.Bundle.Sizes, random)).ToArray();
        }

        private EdificeTensor[] RandomFrame(int batch)
        {
            return model.Bundle.Graph("stream").OwnInputs.Select(spec => Numbers.Draw(spec, batch, random)).ToArray();
        }

        private EdificeTensor[] Read(string folder, string kind, int count)
        {
            return Enumerable.Range(0, count)
                .Select(i => TensorFile.Read(model.Bundle.Check($"{folder}/{kind}_{i}.pb"))).ToArray();
        }

        private void Expect(bool holds, string problem)
        {
            if (!holds)
            {
                Problem ??= problem;
            }
        }
    }
}

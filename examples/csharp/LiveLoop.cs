using System;
using System.Diagnostics;
using System.Linq;
using System.Threading;

namespace Edifice
{
    /// <summary>
    /// A game's loop: 60 frames a second, and now and then input comes late, so that frames already simulated are
    /// simulated again from a snapshot. Here with the frames of before, to show that the outputs are bitwise the same.
    /// </summary>
    public sealed class LiveLoop
    {
        public const double Budget = 1000.0 / 60;
        private const int Depth = 12; // frames that a rollback goes back at most

        private readonly EdificeModel model;
        private readonly int count;

        public LiveLoop(EdificeModel model, int seconds) => (this.model, count) = (model, seconds * 60);

        public int Frames => count;
        public int Rollbacks { get; private set; }
        public int Replayed { get; private set; }

        /// <summary>Frames after a rollback whose output was not bitwise that of before.</summary>
        public int Different { get; private set; }

        /// <summary>Frames that took longer than a sixtieth of a second.</summary>
        public int Late { get; private set; }

        public (double P50, double P99, double Max) Times { get; private set; }
        public long Bytes { get; private set; }
        public int Collections { get; private set; }

        public void Run()
        {
            using EdificeStream stream = model.OpenStream();
            var random = new Random(1);
            var ticks = new long[count];
            InputSpec[] specs = model.Bundle.Graph("stream").OwnInputs;
            var inputs = new EdificeTensor[Depth][];
            var outputs = new EdificeTensor[Depth][];
            for (int i = 0; i < Depth; i++)
            {
                inputs[i] = specs.Select(spec => Numbers.Draw(spec, 1, random)).ToArray();
                outputs[i] = Numbers.Copy(stream.Step(inputs[i])); // the first run of a session plans its memory
            }
            stream.Reset();
            EdificeSnapshot mark = stream.Snapshot();
            int depth = 0; // frames since the mark; none while there is no mark
            int target = 0;
            long bytes = GC.GetAllocatedBytesForCurrentThread();
            int collections = GC.CollectionCount(0);
            long begin = Stopwatch.GetTimestamp();
            for (int i = 0; i < count; i++)
            {
                WaitUntil(begin + (long)(i * Budget / 1000 * Stopwatch.Frequency));
                long start = Stopwatch.GetTimestamp();
                if (target == 0 && random.Next(10) == 0)
                {
                    stream.Snapshot(mark);
                    (depth, target) = (0, random.Next(1, Depth + 1));
                }
                for (int j = 0; j < specs.Length; j++)
                {
                    Numbers.Draw(specs[j], inputs[depth][j], random);
                }
                Numbers.CopyTo(stream.Step(inputs[depth]), outputs[depth]);
                if (target > 0 && ++depth == target)
                {
                    stream.Restore(mark);
                    for (int j = 0; j < target; j++)
                    {
                        Different += Numbers.Same(stream.Step(inputs[j]), outputs[j]) ? 0 : 1;
                    }
                    Rollbacks++;
                    Replayed += target;
                    (depth, target) = (0, 0);
                }
                ticks[i] = Stopwatch.GetTimestamp() - start;
                Late += ticks[i] * 1000.0 / Stopwatch.Frequency > Budget ? 1 : 0;
            }
            Bytes = GC.GetAllocatedBytesForCurrentThread() - bytes;
            Collections = GC.CollectionCount(0) - collections;
            Times = Numbers.Percentiles(ticks);
        }

        /// <summary>Sleeps, and spins for the last two milliseconds: a sleep may take longer than told.</summary>
        private static void WaitUntil(long deadline)
        {
            long spin = Stopwatch.Frequency / 500;
            while (deadline - Stopwatch.GetTimestamp() > spin)
            {
                Thread.Sleep(1);
            }
            while (Stopwatch.GetTimestamp() < deadline)
            {
                Thread.SpinWait(20);
            }
        }
    }
}

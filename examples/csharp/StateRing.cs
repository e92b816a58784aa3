using System;
using System.Linq;
using System.Threading;

namespace Edifice
{
    /// <summary>
    /// The states of a stream in a ring: a frame reads the slot of now and writes the next one, so nothing is updated
    /// in place, and going back is a change of the index.
    /// </summary>
    internal sealed class StateRing : IDisposable
    {
        private static long lastId;

        private readonly Bundle bundle;
        private readonly int batch;
        private readonly EdificeSnapshot initial;
        private readonly int history;
        private readonly StateBuffers[] slots;

        public StateRing(Bundle bundle, int batch, int history)
        {
            (this.bundle, this.batch, this.history) = (bundle, batch, history);
            initial = StateBuffers.Initial(bundle, batch);
            int count = Math.Max(2, history + 1);
            slots = Enumerable.Range(0, count).Select(_ => new StateBuffers(bundle, batch)).ToArray();
            Reset();
        }

        public int Count => slots.Length;

        /// <summary>The place of the slot of now.</summary>
        public int Now { get; private set; }

        /// <summary>Frames that can be gone back by.</summary>
        public int Rewindable { get; private set; }

        public StateBuffers this[int place] => slots[place % slots.Length];

        /// <summary>The slot to write to. What it held leaves the history even if nothing comes of it.</summary>
        public StateBuffers Begin()
        {
            Rewindable = Math.Min(Rewindable, slots.Length - 2);
            return this[Now + 1];
        }

        /// <summary>Goes to the slot that was written to.</summary>
        public void End()
        {
            Now = (Now + 1) % slots.Length;
            slots[Now].Id = Interlocked.Increment(ref lastId);
            Rewindable = Math.Min(Rewindable + 1, history);
        }

        public void Reset()
        {
            initial.Id = Interlocked.Increment(ref lastId);
            slots[Now].Load(initial);
            Rewindable = 0;
        }

        public void Rewind(int frames)
        {
            if (frames < 0 || frames > Rewindable)
            {
                throw new ArgumentException(
                    $"can't rewind {frames} frames: the history holds {Rewindable}, of at most {history}; "
                    + "open the stream with a larger history, or keep snapshots");
            }
            Now = Back(frames);
            Rewindable -= frames;
        }

        public EdificeSnapshot Save(EdificeSnapshot? reuse)
        {
            EdificeSnapshot snapshot = reuse ?? new EdificeSnapshot(initial.Identity);
            if (reuse != null)
            {
                CheckFits(snapshot);
            }
            slots[Now].Save(snapshot);
            return snapshot;
        }

        public void Restore(EdificeSnapshot snapshot)
        {
            CheckFits(snapshot);
            for (int back = 0; back <= Rewindable; back++)
            {
                if (slots[Back(back)].Id == snapshot.Id)
                {
                    Rewind(back);
                    return;
                }
            }
            slots[Now].Load(snapshot);
            Rewindable = 0;
        }

        public void Dispose()
        {
            foreach (StateBuffers slot in slots)
            {
                slot.Dispose();
            }
        }

        private int Back(int frames) => (Now - frames + slots.Length) % slots.Length;

        private void CheckFits(EdificeSnapshot snapshot)
        {
            double size = StateBuffers.Size(bundle, batch, snapshot.Past);
            if (snapshot.Identity != initial.Identity || snapshot.Data.Length != size)
            {
                throw new ArgumentException(
                    $"the snapshot is of {snapshot.Identity} and {snapshot.Data.Length} bytes, and the stream of "
                    + $"{initial.Identity} and {size:0}; restore it in a stream of the same bundle and batch");
            }
        }
    }
}

// What the sample's library promises and its program has no use for. LibraryCheck BUNDLE: a bundle with all graphs, of
// an architecture.
using System;
using System.Collections.Generic;
using System.IO;
using System.Linq;
using System.Threading;
using Edifice;

static class LibraryCheck
{
    static readonly Random Source = new Random(7);

    static int Main(string[] arguments)
    {
        Bundle bundle = Bundle.Open(arguments[0]);
        if (arguments.Length > 1)
        {
            CheckOverflow(bundle);
            return 0;
        }
        using var model = new EdificeModel(bundle);
        CheckWindows(model);
        CheckBatch(model);
        CheckHistory(model);
        CheckRefusals(model);
        CheckRuntimes();
        CheckThreads(model);
        CheckDisposed(bundle);
        CheckDamaged(bundle.Folder);
        return 0;
    }

    static void CheckWindows(EdificeModel model)
    {
        int window = model.Bundle.WindowSize;
        float[] frames = Frames(model, 2 * window);
        using EdificeStream stream = model.OpenStream();
        for (int length = 1; length <= window; length++)
        {
            var prefix = new ReadOnlyMemory<float>(frames, 0, length * model.EmbedDim);
            float[] step = stream.Step(prefix.Span.Slice(prefix.Length - model.EmbedDim)).ToArray();
            Near(model.Run(prefix), step, $"window of {length} frames");
        }
        float[] two = model.Run(frames, 2);
        float[] second = model.Run(new ReadOnlyMemory<float>(frames, window * model.EmbedDim, window * model.EmbedDim));
        Near(two.Skip(model.HiddenSize).ToArray(), second, "second window of a batch");
        Console.WriteLine($"windows of 1 to {window} frames are what the stream gives, and a batch what each window gives");
    }

    static void CheckBatch(EdificeModel model)
    {
        const int Batch = 3, Count = 20;
        using EdificeStream stream = model.OpenStream(Batch, 0);
        EdificeStream[] singles = Enumerable.Range(0, Batch).Select(_ => model.OpenStream()).ToArray();
        for (int i = 0; i < Count; i++)
        {
            float[] frame = Frames(model, Batch);
            float[] output = stream.Step(frame).ToArray();
            for (int entry = 0; entry < Batch; entry++)
            {
                float[] one = singles[entry].Step(frame.AsSpan(entry * model.EmbedDim, model.EmbedDim)).ToArray();
                Near(output.AsSpan(entry * model.HiddenSize, model.HiddenSize).ToArray(), one, $"entry {entry}");
            }
        }
        float[] frames = Frames(model, Count);
        singles[0].Reset();
        singles[1].Reset();
        float[] last = singles[0].Prefill(frames).ToArray();
        for (int i = 0; i < Count; i++)
        {
            singles[1].Step(frames.AsSpan(i * model.EmbedDim, model.EmbedDim));
        }
        float[] next = Frames(model, 1);
        Near(singles[0].Step(next).ToArray(), singles[1].Step(next).ToArray(), "a step after prefill");
        foreach (EdificeStream single in singles)
        {
            single.Dispose();
        }
        Console.WriteLine($"a batch of {Batch} streams is {Batch} streams; prefill of {Count} frames is {Count} steps");
    }

    static void CheckHistory(EdificeModel model)
    {
        float[][] frames = Enumerable.Range(0, 40).Select(_ => Frames(model, 1)).ToArray();
        foreach (int history in new[] { 0, 1, 2, 7, 100 })
        {
            using EdificeStream stream = model.OpenStream(1, history);
            var outputs = new List<float[]>();
            var marks = new List<EdificeSnapshot>();
            foreach (float[] frame in frames)
            {
                marks.Add(stream.Snapshot());
                outputs.Add(stream.Step(frame).ToArray());
                Expect(stream.Rewindable == Math.Min(history, outputs.Count), $"rewindable of history {history}");
            }
            for (int back = 0; back <= Math.Min(history, frames.Length); back++)
            {
                stream.Rewind(back);
                Expect(stream.Rewindable == Math.Min(history, frames.Length) - back, "rewindable after rewind");
                for (int i = frames.Length - back; i < frames.Length; i++)
                {
                    Expect(Same(stream.Step(frames[i]), outputs[i]), $"rewind by {back} of {history}");
                }
            }
            Throws<ArgumentException>(() => stream.Rewind(stream.Rewindable + 1), "history holds");
            for (int i = frames.Length - 1; i >= 0; i -= 3)
            {
                stream.Restore(marks[i]);
                Expect(Same(stream.Step(frames[i]), outputs[i]), $"restore of frame {i}, history {history}");
            }
            stream.Restore(marks[5]);
            stream.Snapshot(marks[6]);
            stream.Reset();
            Expect(stream.Rewindable == 0 && Same(stream.Step(frames[0]), outputs[0]), "reset");
            stream.Restore(marks[6]);
            Expect(Same(stream.Step(frames[5]), outputs[5]), "a snapshot that was used again");
        }
        Console.WriteLine("histories of 0 to 100 frames: rewind, restore inside and outside, reset: bitwise the same");
    }

    static void CheckRefusals(EdificeModel model)
    {
        using EdificeStream stream = model.OpenStream();
        using EdificeStream pair = model.OpenStream(2);
        float[] frame = Frames(model, 1);
        float[] expected = stream.Step(frame).ToArray();
        stream.Rewind(1);
        float[] bad = Frames(model, 1);
        bad[bad.Length / 2] = float.NaN;
        Throws<ArgumentException>(() => stream.Step(bad), "NaN");
        Throws<ArgumentException>(() => stream.Prefill(bad), "NaN");
        foreach (float value in new[] { 3.4e38f, -3.4e38f, 1e30f, 1e19f, -1e18f, 1.001e12f })
        {
            bad = Frames(model, 3);
            bad[bad.Length - 1] = value;
            int last = frame.Length - 1;
            Throws<ArgumentException>(
                () => stream.Step(bad.AsSpan(2 * frame.Length)), $"{value} at [0, {last}]; numbers up to 1e12");
            Throws<ArgumentException>(() => stream.Prefill(bad), $"{value} at [0, 2, {last}]; numbers up to 1e12");
            Throws<ArgumentException>(() => model.Run(bad), $"{value} at [0, 2, {last}]; numbers up to 1e12");
        }
        Throws<ArgumentException>(() => stream.Prefill(Array.Empty<float>()), "whole frames");
        Throws<ArgumentException>(() => stream.Step(Array.Empty<float>()), "takes");
        Throws<ArgumentException>(() => pair.Step(frame), $"has {frame.Length} numbers, and the model takes {2 * frame.Length}");
        Throws<ArgumentException>(() => stream.Restore(pair.Snapshot()), "same bundle and batch");
        Throws<ArgumentException>(() => stream.Rewind(-1), "rewind");
        Throws<ArgumentException>(() => model.OpenStream(0), "batch");
        Throws<ArgumentException>(() => model.OpenStream(int.MaxValue), "GiB");
        Throws<ArgumentException>(() => model.OpenStream(1, -1), "history");
        Throws<ArgumentException>(() => model.Run(frame, 0), "whole frames");
        Expect(Same(stream.Step(frame), expected), "a refused call moved the stream");
        Array.Fill(frame, -EdificeModel.MaxMagnitude);
        stream.Step(frame);
        Console.WriteLine("wrong sizes, NaN, numbers too large, foreign snapshots and impossible options are refused, and nothing moves");
    }

    static void CheckOverflow(Bundle bundle)
    {
        using var model = new EdificeModel(bundle);
        using EdificeStream stream = model.OpenStream();
        float[] frame = Frames(model, 1);
        Throws<InvalidDataException>(() => model.Run(frame), "output is not finite");
        Throws<InvalidDataException>(() => stream.Step(frame), "stays where it was");
        Throws<InvalidDataException>(() => stream.Prefill(frame), "stays where it was");
        Expect(stream.Rewindable == 0, "a refused output moved the stream");
        Console.WriteLine("an output that is not finite is not handed out, and the stream stays where it was");
    }

    static void CheckRuntimes()
    {
        foreach (string old in new[] { "1.23.2", "1.9.0", "0.25.0", "1.23.0-dev", "unknown" })
        {
            Throws<NotSupportedException>(() => EdificeModel.CheckRuntime(old), $"{old} is older than 1.24");
        }
        foreach (string right in new[] { "1.24.1", "1.100.0", "2.0.0", "1.31.0-rev" })
        {
            EdificeModel.CheckRuntime(right);
        }
        Console.WriteLine("an ONNX Runtime below 1.24 is refused");
    }

    static void CheckThreads(EdificeModel model)
    {
        float[][] frames = Enumerable.Range(0, 300).Select(_ => Frames(model, 1)).ToArray();
        float[][] Play()
        {
            using EdificeStream stream = model.OpenStream();
            return frames.Select(frame => stream.Step(frame).ToArray()).ToArray();
        }
        float[][] expected = Play();
        int same = 0;
        Thread[] threads = Enumerable.Range(0, 4).Select(_ => new Thread(() =>
        {
            if (Play().Zip(expected, (one, other) => Same(one, other)).All(equal => equal))
            {
                Interlocked.Increment(ref same);
            }
        })).ToArray();
        foreach (Thread thread in threads)
        {
            thread.Start();
        }
        foreach (Thread thread in threads)
        {
            thread.Join();
        }
        Expect(same == threads.Length, "streams in several threads gave other outputs");
        Console.WriteLine($"{threads.Length} threads with a stream each of one model: bitwise the same");
    }

    static void CheckDisposed(Bundle bundle)
    {
        var model = new EdificeModel(bundle);
        EdificeStream stream = model.OpenStream();
        float[] frame = Frames(model, 1);
        model.Dispose();
        Throws<ObjectDisposedException>(() => stream.Step(frame), "");
        Throws<ObjectDisposedException>(() => model.Run(frame), "");
        stream.Dispose();
        stream.Dispose();
        model.Dispose();
        for (int i = 0; i < 200; i++) // streams that nobody disposes are collected, with what they hold
        {
            new EdificeModel(bundle).OpenStream().Step(frame);
        }
        GC.Collect();
        GC.WaitForPendingFinalizers();
        Console.WriteLine("what was disposed says so; what was not is collected");
    }

    static void CheckDamaged(string folder)
    {
        string copy = Path.Combine(Path.GetTempPath(), Path.GetRandomFileName());
        try
        {
            foreach (string path in Directory.EnumerateFiles(folder, "*", SearchOption.AllDirectories))
            {
                string target = Path.Combine(copy, Path.GetRelativePath(folder, path));
                Directory.CreateDirectory(Path.GetDirectoryName(target)!);
                File.Copy(path, target);
            }
            string model = Path.Combine(copy, "stream", "model.onnx");
            string foreign = Path.Combine(copy, "stream", "weights.bin");
            using var opened = new EdificeModel(Bundle.Open(copy));
            File.WriteAllText(foreign, "");
            Throws<InvalidDataException>(() => opened.OpenStream(), "'stream/weights.bin' is beside a model");
            File.Delete(foreign);
            byte[] content = File.ReadAllBytes(model);
            content[1000] ^= 1;
            File.WriteAllBytes(model, content);
            Throws<InvalidDataException>(() => opened.OpenStream(), "'stream/model.onnx' was changed");
            File.Delete(model);
            Throws<InvalidDataException>(() => opened.OpenStream(), "'stream/model.onnx' is missing");
        }
        finally
        {
            Directory.Delete(copy, recursive: true);
        }
        Console.WriteLine("a model that was changed, is missing or has a foreign file beside it is not opened");
    }

    static float[] Frames(EdificeModel model, int count)
    {
        return Enumerable.Range(0, count * model.EmbedDim).Select(_ => (float)(2 * Source.NextDouble() - 1)).ToArray();
    }

    static void Near(float[] found, float[] expected, string what)
    {
        double error = Numbers.Error(Row(found), Row(expected));
        Expect(error <= 1e-5, $"{what}: an error of {error}");
    }

    static EdificeTensor Row(float[] numbers) => EdificeTensor.Of<float>(numbers, numbers.Length);

    static bool Same(ReadOnlySpan<float> one, ReadOnlySpan<float> other)
    {
        return Numbers.Same(Row(one.ToArray()), Row(other.ToArray()));
    }

    internal static void Throws<T>(Action call, string part) where T : Exception
    {
        try
        {
            call();
        }
        catch (T error)
        {
            Expect(error.Message.Contains(part), $"'{error.Message}' does not say '{part}'");
            return;
        }
        throw new InvalidDataException($"no {typeof(T).Name} that says '{part}'");
    }

    internal static void Expect(bool holds, string what)
    {
        if (!holds)
        {
            throw new InvalidDataException(what);
        }
    }
}

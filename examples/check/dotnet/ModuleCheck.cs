// What the sample's library promises of any module. ModuleCheck BUNDLE...: those of examples/check/handmade.py, without
// and with a prefill graph.
using System;
using System.Collections.Generic;
using System.Linq;
using Edifice;
using Microsoft.ML.OnnxRuntime;
using static LibraryCheck;

static class ModuleCheck
{
    const int Batch = 2, Time = 6;

    static readonly Random Source = new Random(5);

    static int Main(string[] arguments)
    {
        using var model = new EdificeModel(Bundle.Open(arguments[0]));
        using var prefilled = new EdificeModel(Bundle.Open(arguments[1]));
        CheckWindow(model);
        CheckRefusals(model);
        CheckStream(model);
        CheckPrefill(prefilled);
        Throws<ArgumentException>(
            () => model.OpenStream(3).Restore(prefilled.OpenStream(2).Snapshot()), "module Handmade with weights");
        return 0;
    }

    static void CheckWindow(EdificeModel model)
    {
        foreach ((int batch, int time, int width) in new[] { (1, 2, 8), (2, 6, 4), (3, 9, 2) })
        {
            var sizes = new Dictionary<string, int> { ["entries"] = batch, ["time"] = time, ["width"] = width };
            Dictionary<string, EdificeTensor> inputs = model.Bundle.Graph("window").Inputs
                .ToDictionary(spec => spec.Name, spec => Numbers.Draw(spec, sizes, Source));
            Dictionary<string, EdificeTensor> outputs = model.Run(inputs);
            EdificeTensor[] again = model.Run(inputs.Values.ToArray());
            Expect(Numbers.Same(outputs.Values.ToArray(), again), "by name and in order differ");
            Expected(inputs, outputs, batch, time, width);
        }
        Console.WriteLine("five types, ranks 0 to 3, and sizes that are free: by name and in order, as computed here");
    }

    /// <summary>What the module says, in C#.</summary>
    static void Expected(
        Dictionary<string, EdificeTensor> inputs, Dictionary<string, EdificeTensor> outputs, int batch, int time,
        int width)
    {
        float[] signal = inputs["signal"].Numbers<float>().ToArray();
        float[] offset = inputs["offset"].Numbers<float>().ToArray();
        long[] kinds = inputs["kinds"].Numbers<long>().ToArray();
        bool[] mask = inputs["mask"].Numbers<bool>().ToArray();
        string shapes = $"{batch} {time}, {batch} {width}, {batch} {time + 1}, , , {batch}, {batch} 3";
        Expect(Shapes(outputs) == shapes, Shapes(outputs));
        float total = 0;
        for (int entry = 0; entry < batch; entry++)
        {
            long count = inputs["level"].Numbers<int>()[0];
            ReadOnlySpan<bool> flags = outputs["flags"].Numbers<bool>().Slice(entry * (time + 1), time + 1);
            for (int i = 0; i < time; i++)
            {
                int place = entry * time + i;
                float sum = Enumerable.Range(0, 3).Sum(k => signal[3 * place + k] + offset[k]) + kinds[place];
                (total, count) = (total + sum, count + kinds[place]);
                Expect(Math.Abs(outputs["sums"].Numbers<float>()[place] - sum) < 1e-5, "sums");
                Expect(flags[i] == (mask[place] && sum > 0), "flags");
            }
            Expect(flags[time] == mask[entry * time], "flags, the last");
            Expect(outputs["counts"].Numbers<long>()[entry] == count, "counts");
        }
        for (int i = 0; i < batch * width; i++)
        {
            float gain = (float)inputs["gain"].Numbers<Float16>()[i];
            Expect((Float16)(gain * gain) == outputs["square"].Numbers<Float16>()[i], "square");
        }
        for (int i = 0; i < batch * 3; i++)
        {
            Expect(outputs["twice"].Numbers<int>()[i] == 2 * inputs["codes"].Numbers<int>()[i], "twice");
        }
        Expect(outputs["count"].Numbers<long>()[0] == kinds.Sum(), "count");
        Expect(Math.Abs(outputs["total"].Numbers<float>()[0] - total) < 1e-4, "total");
        Throws<ArgumentException>(() => outputs["total"].Numbers<int>(), "float32");
    }

    static string Shapes(Dictionary<string, EdificeTensor> outputs)
    {
        string[] names = { "sums", "square", "flags", "total", "count", "counts", "twice" };
        return string.Join(", ", names.Select(name => string.Join(" ", outputs[name].Shape)));
    }

    static void CheckRefusals(EdificeModel model)
    {
        void Refused(int place, EdificeTensor given, string says)
        {
            EdificeTensor[] inputs = Window(model);
            inputs[place] = given;
            Throws<ArgumentException>(() => model.Run(inputs), says);
        }
        var signal = new float[Batch * Time * 3];
        var kinds = new long[Batch * Time];
        kinds[2] = 9;
        Refused(1, Of(kinds, Batch, Time), "kinds holds 9 at [0, 2]; there are 0 to 4, give those");
        (kinds[2], kinds[7]) = (0, -1);
        Refused(1, Of(kinds, Batch, Time), "kinds holds -1 at [1, 1]; there are 0 to 4");
        Refused(1, Of(kinds, 3, 4), "kinds has a entries of 3, and what was given before one of 2");
        Refused(1, Of(new int[12], Batch, Time), "kinds is int32 [2, 6], and the model takes kinds int64 [entries, time]");
        Refused(0, Of(signal, Batch, 9, 2), "[2, 9, 2], and the model takes signal float32 [entries, time, 3]");
        Refused(0, Of(signal, 12, 3), "[12, 3], and the model takes");
        EdificeTensor shorter = EdificeTensor.Of<float>(signal.AsMemory(1), Batch, Time, 3);
        Refused(0, shorter, "signal has 35 numbers, and the model takes 36");
        Refused(0, Of(new float[30], Batch, 5, 3), "kinds has a time of 6, and what was given before one of 5");
        Refused(0, Of(new float[6], Batch, 1, 3), "signal has a time of 1, and the model takes 2 or more");
        Refused(0, Of(new float[60], Batch, 10, 3), "signal has a time of 10, and the model takes at most 9");
        Refused(0, Of(new float[0], 0, Time, 3), "signal has a entries of 0, and the model takes 1 or more");
        signal[29] = float.NegativeInfinity;
        Refused(0, Of(signal, Batch, Time, 3), "signal holds -Infinity at [1, 3, 2]; give finite numbers");
        Refused(2, Of(new[] { (Float16)1f, Float16.NaN, default, default }, 2, 2), "gain holds NaN at [0, 1]; give finite");
        Refused(2, Of(new Float16[2], Batch, 1), "gain has a width of 1, and the model takes 2 or more");
        Refused(4, Of(new[] { 0, 1, 2, 3, 4, 5 }, Batch, 3), "codes holds 5 at [1, 2]; there are 0 to 4, give those");
        Refused(5, Of(new int[1], 1), "level is int32 [1], and the model takes level int32 []");
        Refused(6, Of(new float[4], 4), "offset is float32 [4], and the model takes offset float32 [3]");
        EdificeTensor[] inputs = Window(model);
        Throws<ArgumentException>(() => model.Run(inputs[0]), "Handmade takes signal float32 [entries, time, 3], kinds");
        Throws<ArgumentException>(() => model.Run(signal), "give and take EdificeTensors");
        Throws<ArgumentException>(
            () => model.Run(new Dictionary<string, EdificeTensor> { ["signals"] = inputs[0] }), "got signals");
        Throws<ArgumentException>(() => Of(new double[1], 1), "and not Double");
        Array.Fill(signal, EdificeModel.MaxMagnitude);
        inputs[0] = Of(signal, Batch, Time, 3);
        inputs[2] = Of(Enumerable.Repeat(Float16.MaxValue, 4).ToArray(), 2, 2);
        Throws<System.IO.InvalidDataException>(() => model.Run(inputs), "square is not finite: float16 overflows");
        Console.WriteLine("unknown ids, sizes that disagree, wrong fixed sizes, types, ranks and limits are refused");
    }

    static void CheckStream(EdificeModel model)
    {
        using EdificeStream stream = model.OpenStream(Batch, 3);
        var signal = new float[] { 1, 2, 3, 4, 5, 6 };
        EdificeTensor first = Of(signal, Batch, 3);
        EdificeTensor second = Of(new long[] { 4, 1 }, Batch);
        EdificeTensor[] outputs = Numbers.Copy(stream.Step(first, second));
        // The states start from a file, [0.25, -1.5], from 0.5, from 7 and from 3.
        Expect(outputs[0].Numbers<float>().ToArray().SequenceEqual(new[] { 5.125f, 5.9375f, 2.125f, 5.1875f }), "score");
        Expect(outputs[1].Numbers<long>().ToArray().SequenceEqual(new[] { 44L, 32 }), "seen_so_far");
        Throws<ArgumentException>(() => stream.Step(first), "a step takes signal float32 [entries, 3], kinds");
        Throws<ArgumentException>(() => stream.Step(signal), "give and take EdificeTensors");
        Throws<NotSupportedException>(() => stream.Prefill(signal), "has no prefill graph");
        Throws<NotSupportedException>(
            () => stream.Prefill(first, second), "has no prefill graph, only window and stream; its module has none");
        Throws<ArgumentException>(() => stream.Step(second, first), "signal is int64 [2], and the model takes");
        Throws<ArgumentException>(
            () => stream.Step(first, Of(new long[1], 1)), "kinds has a entries of 1, and the stream one of 2");
        Throws<ArgumentException>(
            () => stream.Step(first, Of(new long[] { 0, 5 }, Batch)), "kinds holds 5 at [1]; there are 0 to 4");
        EdificeSnapshot mark = stream.Snapshot();
        outputs = Numbers.Copy(stream.Step(first, second));
        Expect(outputs[1].Numbers<long>().ToArray().SequenceEqual(new[] { 75L, 45 }), "a refused frame moved the stream");
        stream.Restore(mark);
        Expect(Numbers.Same(stream.Step(first, second), outputs), "restore");
        stream.Rewind(1);
        Expect(Numbers.Same(stream.Step(first, second), outputs), "rewind");
        Console.WriteLine("a stream of two inputs and outputs, without a prefill graph: steps, refusals, restore, rewind");
    }

    static void CheckPrefill(EdificeModel model)
    {
        using EdificeStream stream = model.OpenStream(Batch), other = model.OpenStream(Batch);
        EdificeTensor[] inputs = Window(model);
        foreach (int length in new[] { 1, 4, 5, 8, 11 }) // its prefill graph takes 4 frames at once
        {
            var sizes = new Dictionary<string, int> { ["entries"] = Batch, ["time"] = length };
            EdificeTensor[] frames = model.Bundle.Graph("prefill").OwnInputs
                .Select(spec => Numbers.Draw(spec, sizes, Source)).ToArray();
            IReadOnlyList<EdificeTensor> last = stream.Prefill(frames);
            for (int i = 0; i < length; i++)
            {
                IReadOnlyList<EdificeTensor> step = other.Step(frames.Select(each => Numbers.Gather(each, i)).ToArray());
                Expect(i < length - 1 || last.Zip(step, Numbers.Error).All(error => error <= 1e-5), $"{length} frames");
            }
        }
        EdificeTensor[] before = Numbers.Copy(other.Step(First()));
        Expect(stream.Step(First()).Zip(before, Numbers.Error).All(error => error <= 1e-5), "a step after prefills");
        stream.Rewind(2);
        other.Rewind(12);
        before = Numbers.Copy(other.Step(First()));
        Expect(stream.Step(First()).Zip(before, Numbers.Error).All(error => error <= 1e-5), "rewind of a prefill");
        Throws<ArgumentException>(
            () => stream.Prefill(inputs[0], Of(new long[10], Batch, 5)), "kinds has a time of 5");
        Throws<ArgumentException>(
            () => stream.Prefill(Of(new float[6], 1, 2, 3), Of(new long[2], 1, 2)),
            "signal has a entries of 1, and the stream one of 2");
        Console.WriteLine("a prefill of two inputs, in pieces too, is as many steps; rewind goes back over it");
    }

    static EdificeTensor Of<T>(T[] numbers, params long[] shape) where T : unmanaged
    {
        return EdificeTensor.Of<T>(numbers, shape);
    }

    static EdificeTensor[] First()
    {
        return new[] { Of(new float[Batch * 3], Batch, 3), Of(new long[] { 1, 2 }, Batch) };
    }

    static EdificeTensor[] Window(EdificeModel model)
    {
        return model.Bundle.Graph("window").Inputs
            .Select(spec => Numbers.Draw(spec, model.Bundle.Sizes, Source)).ToArray();
    }
}

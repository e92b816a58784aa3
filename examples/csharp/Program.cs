using System;
using System.Collections.Generic;
using System.Globalization;
using System.IO;
using System.Linq;
using System.Text;
using System.Text.Json;
using Microsoft.ML.OnnxRuntime;

namespace Edifice
{
    /// <summary>Shows that a bundle computes here what it computed where it was built, and how fast.</summary>
    public static class Program
    {
        private const string Usage =
            "usage: edifice [BUNDLE=../bundle] [--provider NAME=cpu] [--threads N=1] [--frames N=10000] "
            + "[--live SECONDS] [--json]";

        /// <returns>0: all right; 1: a check failed; 2: the request was wrong.</returns>
        public static int Main(string[] arguments)
        {
            CultureInfo.CurrentCulture = CultureInfo.InvariantCulture;
            try
            {
                return Run(arguments);
            }
            catch (InvalidDataException error)
            {
                return Fail(1, error.Message);
            }
            catch (OnnxRuntimeException error)
            {
                return Fail(
                    1, $"ONNX Runtime failed: {error.Message}; build or copy the bundle again, or update ONNX Runtime");
            }
            catch (Exception error) when (
                error is ArgumentException || error is NotSupportedException || error is IOException
                || error is UnauthorizedAccessException || error is OutOfMemoryException)
            {
                return Fail(2, error.Message);
            }
            catch (TypeInitializationException error)
            {
                // The library of ONNX Runtime is loaded when its first class is used.
                string reason = error.GetBaseException().Message.Split(". ")[0];
                return Fail(2, $"ONNX Runtime can't be loaded: {reason}; keep its library beside the program");
            }
        }

        private static int Run(string[] arguments)
        {
            var values = new Dictionary<string, string>
            {
                ["--provider"] = "cpu", ["--threads"] = "1", ["--frames"] = "10000", ["--live"] = "",
            };
            string? folder = null;
            bool json = false;
            for (int i = 0; i < arguments.Length; i++)
            {
                string argument = arguments[i];
                if (argument == "--json")
                {
                    json = true;
                }
                else if (values.ContainsKey(argument))
                {
                    values[argument] = i + 1 < arguments.Length
                        ? arguments[++i]
                        : throw new ArgumentException($"{argument}: stands without a value; {Usage}");
                }
                else if (argument.StartsWith("-", StringComparison.Ordinal))
                {
                    throw new ArgumentException($"{argument}: there is no such option; {Usage}");
                }
                else if (folder != null)
                {
                    throw new ArgumentException($"{argument}: is a second bundle, and one is checked; {Usage}");
                }
                else
                {
                    folder = argument;
                }
            }
            int threads = Number("--threads", values["--threads"], 1);
            int frames = Number("--frames", values["--frames"], 1);
            int live = values["--live"] == "" ? 0 : Number("--live", values["--live"], 1);
            using var model = new EdificeModel(Bundle.Open(folder ?? "../bundle"), values["--provider"], threads);
            return live > 0 ? Live(model, live, json) : Check(model, threads, frames, json);
        }

        private static int Check(EdificeModel model, int threads, int frames, bool json)
        {
            var check = new SelfCheck(model, frames);
            check.Run();
            if (json)
            {
                Print(model, check.Problem == null, writer => WriteCheck(writer, check));
            }
            else
            {
                PrintCheck(model, threads, check);
            }
            return check.Problem == null
                ? 0
                : Fail(1, $"bundle {model.Bundle.Folder}: {check.Problem}; report it with the versions of both sides");
        }

        private static void WriteCheck(Utf8JsonWriter writer, SelfCheck check)
        {
            writer.WriteNumber("rollbacks", check.RolledBack);
            writer.WriteString("refused", check.Refused);
            writer.WriteStartArray("graphs");
            foreach (GraphReport report in check.Graphs)
            {
                writer.WriteStartObject();
                writer.WriteString("graph", report.Graph);
                writer.WriteNumber("tensors", report.Tensors);
                if (double.IsInfinity(report.Error))
                {
                    writer.WriteNull("error"); // JSON has no infinity
                }
                else
                {
                    writer.WriteNumber("error", report.Error);
                }
                WriteTimes(writer, report.Times);
                writer.WriteEndObject();
            }
            writer.WriteEndArray();
            foreach (GraphReport report in check.Graphs.Where(report => report.Graph == "stream"))
            {
                writer.WriteNumber("bytes_per_frame", report.Bytes);
            }
        }

        private static void PrintCheck(EdificeModel model, int threads, SelfCheck check)
        {
            string sizes = string.Concat(model.Bundle.Sizes.Select(size => $"{size.Key} {size.Value}, "));
            Console.WriteLine(
                $"{Printable.Line(model.Bundle.Name)}, {Printable.Line(sizes)}on ONNX Runtime "
                + $"{OrtEnv.Instance().GetVersionString()}, {model.Provider}, threads {threads}");
            Console.WriteLine("graph    tensors    error   p50 ms   p99 ms   max ms  bytes a call");
            foreach (GraphReport report in check.Graphs)
            {
                (double p50, double p99, double max) = report.Times;
                Console.WriteLine(
                    $"{report.Graph,-8} {report.Tensors,7} {report.Error,8:0.0e+00} {p50,8:0.000} {p99,8:0.000} "
                    + $"{max,8:0.000} {report.Bytes,13:0.##}");
            }
            Console.WriteLine($"rollbacks, bitwise the same: {check.RolledBack}");
            Console.WriteLine($"refused: {Printable.Line(check.Refused)}");
            Console.WriteLine(check.Problem == null ? "ok" : "not ok");
        }

        private static int Live(EdificeModel model, int seconds, bool json)
        {
            var loop = new LiveLoop(model, seconds);
            loop.Run();
            if (json)
            {
                Print(model, loop.Different == 0, writer =>
                {
                    writer.WriteNumber("frames", loop.Frames);
                    writer.WriteNumber("rollbacks", loop.Rollbacks);
                    writer.WriteNumber("replayed", loop.Replayed);
                    writer.WriteNumber("different", loop.Different);
                    WriteTimes(writer, loop.Times);
                    writer.WriteNumber("budget_ms", LiveLoop.Budget);
                    writer.WriteNumber("late", loop.Late);
                    writer.WriteNumber("bytes", loop.Bytes);
                    writer.WriteNumber("collections", loop.Collections);
                });
            }
            else
            {
                Console.WriteLine(
                    $"{loop.Frames} frames at 60 a second; {loop.Rollbacks} rollbacks with {loop.Replayed} frames "
                    + $"again, {loop.Different} of them with another output");
                Console.WriteLine(
                    $"a frame, rollback included, took p50 {loop.Times.P50:0.000}, p99 {loop.Times.P99:0.000}, max "
                    + $"{loop.Times.Max:0.000} of {LiveLoop.Budget:0.00} ms; {loop.Late} were late");
                Console.WriteLine($"managed memory: {loop.Bytes} bytes, {loop.Collections} collections");
            }
            return loop.Different == 0
                ? 0
                : Fail(1, $"bundle {model.Bundle.Folder}: {loop.Different} outputs differ after a rollback; report it");
        }

        private static void Print(EdificeModel model, bool ok, Action<Utf8JsonWriter> fields)
        {
            using var buffer = new MemoryStream();
            using (var writer = new Utf8JsonWriter(buffer))
            {
                writer.WriteStartObject();
                writer.WriteString("language", "csharp");
                writer.WriteString("runtime", OrtEnv.Instance().GetVersionString());
                writer.WriteString("provider", model.Provider);
                writer.WriteString("program", model.Bundle.Name);
                fields(writer);
                writer.WriteBoolean("ok", ok);
                writer.WriteEndObject();
            }
            Console.WriteLine(Encoding.UTF8.GetString(buffer.ToArray()));
        }

        private static void WriteTimes(Utf8JsonWriter writer, (double P50, double P99, double Max) times)
        {
            writer.WriteNumber("p50_ms", times.P50);
            writer.WriteNumber("p99_ms", times.P99);
            writer.WriteNumber("max_ms", times.Max);
        }

        private static int Number(string option, string value, int least)
        {
            bool whole = int.TryParse(value, NumberStyles.None, CultureInfo.InvariantCulture, out int number);
            return whole && number >= least
                ? number
                : throw new ArgumentException($"{option} {value}: is not a whole number from {least}; {Usage}");
        }

        private static int Fail(int status, string message)
        {
            Console.Error.WriteLine("error: " + Printable.Line(message));
            return status;
        }
    }
}

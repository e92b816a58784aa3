using System;
using System.Collections.Generic;
using System.IO;
using System.Linq;
using System.Runtime.InteropServices;
using Microsoft.ML.OnnxRuntime;

namespace Edifice
{
    /// <summary>
    /// The graphs of a bundle on one provider. A graph is checked and loaded when it is first used. Any number of
    /// threads may use a model at once.
    /// </summary>
    public sealed class EdificeModel : IDisposable
    {
        /// <summary>The first ONNX Runtime that is right on every graph.</summary>
        public static readonly Version OldestRuntime = new Version(1, 24);

        /// <summary>
        /// The largest number that a frame may hold: models square them, and are verified up to here.
        /// </summary>
        public const float MaxMagnitude = 1e12f;

        private readonly Dictionary<string, InferenceSession> sessions = new Dictionary<string, InferenceSession>();
        private readonly SessionOptions options;

        /// <param name="bundle">What to run.</param>
        /// <param name="provider">cpu, cuda, dml or coreml; the package of ONNX Runtime must have it.</param>
        /// <param name="threads">Threads that one run may use; a frame is too little work for more than one.</param>
        /// <exception cref="NotSupportedException">The provider can't be had, or ONNX Runtime is too old.</exception>
        public EdificeModel(Bundle bundle, string provider = "cpu", int threads = 1)
        {
            if (threads < 1)
            {
                throw new ArgumentException($"threads must be from 1, got {threads}");
            }
            CheckRuntime(OrtEnv.Instance().GetVersionString());
            (Bundle, Provider) = (bundle, provider);
            GraphSpec any = bundle.Graph(bundle.Graphs.First());
            (EmbedDim, HiddenSize) = (any.Inputs[0].Shape[^1], any.Outputs[0].Shape[^1]);
            options = new SessionOptions
            {
                IntraOpNumThreads = threads,
                // What goes wrong is thrown; the log would say it once more.
                LogSeverityLevel = OrtLoggingLevel.ORT_LOGGING_LEVEL_FATAL,
            };
            AppendProvider();
        }

        public Bundle Bundle { get; }
        public string Provider { get; }
        public bool IsDisposed { get; private set; }

        /// <summary>Numbers in a frame.</summary>
        public int EmbedDim { get; }

        /// <summary>Numbers in an output.</summary>
        public int HiddenSize { get; }

        /// <summary>Refuses a version of ONNX Runtime that is wrong on some graphs or fails on them.</summary>
        /// <exception cref="NotSupportedException">It is older than OldestRuntime.</exception>
        public static void CheckRuntime(string found)
        {
            string numbers = found.Split('-', '+')[0];
            if (!Version.TryParse(numbers, out Version? version) || version < OldestRuntime)
            {
                throw new NotSupportedException(
                    $"ONNX Runtime {found} is older than {OldestRuntime}, the first that is right on every graph of a "
                    + "bundle; take a newer package (edifice.csproj names one)");
            }
        }

        /// <summary>Runs windows of one length side by side.</summary>
        /// <param name="frames">float32 [batch, sequence, EmbedDim]; the sequence is what their number gives.</param>
        /// <param name="batch">How many windows.</param>
        /// <returns>float32 [batch, HiddenSize]: the output at the last frame of each window.</returns>
        /// <exception cref="ArgumentException">
        /// No whole frames, a NaN or a number beyond MaxMagnitude, or more frames than it can compute.
        /// </exception>
        /// <exception cref="InvalidDataException">The output is not finite.</exception>
        public float[] Run(ReadOnlyMemory<float> frames, int batch = 1)
        {
            InferenceSession session = Session("window");
            long[] shape = SequenceShape(Bundle.Graph("window"), frames.Span, batch);
            var output = new float[batch * HiddenSize];
            using RunOptions run = QuietRun();
            // Nothing writes to an input; OrtValue has no read-only kind.
            using OrtValue input = OrtValue.CreateTensorValueFromMemory(
                OrtMemoryInfo.DefaultInstance, MemoryMarshal.AsMemory(frames), shape);
            using OrtValue result = OrtValue.CreateTensorValueFromMemory(output, new long[] { batch, HiddenSize });
            session.Run(run, session.InputNames, new[] { input }, session.OutputNames, new[] { result });
            CheckOutput(output, "");
            return output;
        }

        /// <summary>A stream, or a batch of streams side by side, from the state before the first frame.</summary>
        /// <param name="batch">How many streams.</param>
        /// <param name="history">Frames that they can be rewound by at most.</param>
        public EdificeStream OpenStream(int batch = 1, int history = 16) => new EdificeStream(this, batch, history);

        /// <summary>The session of a graph: window, stream or prefill. It belongs to the model.</summary>
        public InferenceSession Session(string name)
        {
            if (IsDisposed)
            {
                throw new ObjectDisposedException(nameof(EdificeModel));
            }
            lock (sessions)
            {
                if (!sessions.TryGetValue(name, out InferenceSession? session))
                {
                    session = new InferenceSession(Bundle.CheckModel(Bundle.Graph(name)), options);
                    sessions[name] = session;
                }
                return session;
            }
        }

        /// <summary>Frees the sessions. No stream or run may be under way.</summary>
        public void Dispose()
        {
            IsDisposed = true;
            foreach (InferenceSession session in sessions.Values)
            {
                session.Dispose();
            }
            sessions.Clear();
            options.Dispose();
        }

        /// <summary>The shape [batch, sequence, EmbedDim] of frames, unless the graph would not take them.</summary>
        internal static long[] SequenceShape(GraphSpec graph, ReadOnlySpan<float> frames, int batch)
        {
            int width = graph.Inputs[0].Shape[^1];
            long one = (long)batch * width;
            if (batch < 1 || frames.Length == 0 || frames.Length % one != 0)
            {
                throw new ArgumentException(
                    $"state_sequence has {frames.Length} numbers, and the model takes a multiple of {one} "
                    + $"(float32 [{batch}, sequence, {width}]); give whole frames");
            }
            long sequence = frames.Length / one;
            if (sequence > graph.MaxSequence)
            {
                throw new ArgumentException(
                    $"state_sequence has {sequence} frames, and the model takes at most {graph.MaxSequence}; "
                    + "give fewer, or build it with a larger --window-size");
            }
            CheckNumbers("state_sequence", frames, width, (int)sequence);
            return new[] { batch, sequence, width };
        }

        /// <summary>Options of a run that logs nothing: what goes wrong is thrown.</summary>
        internal static RunOptions QuietRun()
        {
            return new RunOptions { LogSeverityLevel = OrtLoggingLevel.ORT_LOGGING_LEVEL_FATAL };
        }

        /// <summary>Refuses numbers that are not finite or beyond MaxMagnitude; length is 0 of one frame.</summary>
        internal static void CheckNumbers(string name, ReadOnlySpan<float> numbers, int width = 1, int length = 0)
        {
            for (int i = 0; i < numbers.Length; i++)
            {
                if (Math.Abs(numbers[i]) <= MaxMagnitude) // a NaN is not
                {
                    continue;
                }
                string frame = length == 0 ? "" : $" in frame {i / width % length}";
                throw new ArgumentException($"{name} has {numbers[i]} at place {i}{frame}; " + (
                    float.IsFinite(numbers[i])
                        ? "numbers up to 1e12 are taken, beyond which float32 may overflow; scale or mend the input"
                        : "give finite numbers"));
            }
        }

        /// <summary>Refuses an output that is not finite.</summary>
        internal static void CheckOutput(ReadOnlySpan<float> output, string consequence)
        {
            foreach (float number in output)
            {
                if (!float.IsFinite(number))
                {
                    throw new InvalidDataException(
                        $"output is not finite: float32 overflows in this model on these frames{consequence}; "
                        + "scale them down, or mend the weights");
                }
            }
        }

        private void AppendProvider()
        {
            if (Provider == "cpu")
            {
                return; // always there, and last in the list of every session
            }
            string full = Provider switch
            {
                "cuda" => "CUDAExecutionProvider",
                "dml" => "DmlExecutionProvider",
                "coreml" => "CoreMLExecutionProvider",
                _ => throw new NotSupportedException(
                    $"provider {Provider}: is not one that this program knows; use cpu, cuda, dml or coreml"),
            };
            string[] found = OrtEnv.Instance().GetAvailableProviders();
            if (!found.Contains(full))
            {
                throw new NotSupportedException(
                    $"provider {Provider}: is not in this ONNX Runtime, which has {string.Join(", ", found)}; "
                    + "take the package that has it (README.md lists them)");
            }
            try
            {
                switch (Provider)
                {
                    case "cuda":
                        using (var cuda = new OrtCUDAProviderOptions())
                        {
                            // TF32's 10 bits of mantissa are not enough.
                            cuda.UpdateOptions(new Dictionary<string, string> { ["use_tf32"] = "0" });
                            options.AppendExecutionProvider_CUDA(cuda);
                        }
                        break;
                    case "dml":
                        options.EnableMemoryPattern = false; // DirectML takes sessions without it only
                        options.AppendExecutionProvider_DML();
                        break;
                    case "coreml":
                        options.AppendExecutionProvider("CoreML");
                        break;
                }
            }
            catch (Exception error) when (error is OnnxRuntimeException || error is EntryPointNotFoundException)
            {
                throw new NotSupportedException($"provider {Provider}: can't be used: {error.Message}", error);
            }
        }
    }
}

using System;
using System.Collections.Generic;
using System.IO;
using System.Linq;
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
            (EmbedDim, HiddenSize) = (any.OwnInputs[0].Width, any.OwnOutputs[0].Width);
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

        /// <summary>Numbers in a frame of the first input.</summary>
        public int EmbedDim { get; }

        /// <summary>Numbers in a frame of the first output.</summary>
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

        /// <summary>Runs the window graph.</summary>
        /// <param name="inputs">One tensor for each of `Bundle.Graph("window").Inputs`, in their order.</param>
        /// <returns>One for each of its outputs, in their order.</returns>
        /// <exception cref="ArgumentException">
        /// Another number of tensors, type, rank or size, sizes of one name that differ or that the graph can't
        /// compute, a NaN, a number beyond MaxMagnitude, or an id that there is not.
        /// </exception>
        /// <exception cref="NotSupportedException">The bundle was built without the window graph.</exception>
        /// <exception cref="InvalidDataException">An output is not finite.</exception>
        public EdificeTensor[] Run(params EdificeTensor[] inputs) => RunGraph("window", inputs);

        /// <summary>Runs the window graph on inputs by name, and gives its outputs by name.</summary>
        /// <exception cref="ArgumentException">As above; or a name that is missing, or one too many.</exception>
        public Dictionary<string, EdificeTensor> Run(IReadOnlyDictionary<string, EdificeTensor> inputs)
        {
            GraphSpec graph = Bundle.Graph("window");
            if (inputs.Count != graph.Inputs.Length || !graph.Inputs.All(spec => inputs.ContainsKey(spec.Name)))
            {
                throw new ArgumentException(
                    $"{Bundle.Name} takes {string.Join<InputSpec>(", ", graph.Inputs)}; "
                    + $"got {string.Join(", ", inputs.Keys)}");
            }
            EdificeTensor[] outputs = Run(graph.Inputs.Select(spec => inputs[spec.Name]).ToArray());
            return graph.Outputs.Zip(outputs, (spec, output) => (spec.Name, output))
                .ToDictionary(pair => pair.Name, pair => pair.output);
        }

        /// <summary>Runs the window graph of one float32 input and one float32 output.</summary>
        /// <param name="numbers">
        /// Such as float32 [batch, sequence, EmbedDim]; the sequence is what their number gives.
        /// </param>
        /// <param name="batch">How many entries, such as windows of one length side by side.</param>
        /// <returns>The output's numbers, such as float32 [batch, HiddenSize].</returns>
        /// <exception cref="ArgumentException">As above; or a model of other inputs and outputs.</exception>
        public float[] Run(ReadOnlyMemory<float> numbers, int batch = 1)
        {
            return Run(Sequence(Bundle.Graph("window"), numbers, batch))[0].Numbers<float>().ToArray();
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

        /// <summary>Runs a graph on all its inputs, states included, and gives all its outputs.</summary>
        internal EdificeTensor[] RunGraph(string name, EdificeTensor[] inputs)
        {
            GraphSpec graph = Bundle.Graph(name);
            InferenceSession session = Session(name);
            TensorCheck.Inputs(Bundle.Name, graph, graph.Inputs, inputs);
            using RunOptions run = QuietRun();
            OrtValue[] values = inputs.Select(input => input.ToOrtValue()).ToArray();
            try
            {
                using IDisposableReadOnlyCollection<OrtValue> results =
                    session.Run(run, graph.InputNames, values, graph.OutputNames);
                EdificeTensor[] outputs = results.Select(EdificeTensor.Copy).ToArray();
                for (int i = 0; i < graph.OwnOutputs.Length; i++)
                {
                    TensorCheck.Finite(graph.OwnOutputs[i], outputs[i]);
                }
                return outputs;
            }
            finally
            {
                foreach (OrtValue value in values)
                {
                    value.Dispose();
                }
            }
        }

        /// <summary>Numbers as the one input of a graph, whose one free size beside the batch they tell.</summary>
        internal static EdificeTensor Sequence(GraphSpec graph, ReadOnlyMemory<float> numbers, int batch)
        {
            InputSpec spec = graph.OnlyFloats();
            Size[] free = spec.Shape.Skip(1).Where(size => size.Symbol != null).ToArray();
            if (spec.Shape.Length == 0 || spec.Shape[0].Symbol == null || free.Length > 1)
            {
                throw new ArgumentException($"numbers alone don't tell the sizes of {spec}; give an EdificeTensor");
            }
            long one = (long)batch * spec.Width;
            long length = batch < 1 ? 0 : numbers.Length / one;
            long[] shape = spec.Shape.Skip(1).Select(size => size.Symbol == null ? size.Number : length)
                .Prepend(batch).ToArray();
            if (length == 0 || (free.Length == 1 && numbers.Length % one != 0))
            {
                string sizes = string.Join(", ", spec.Shape.Skip(1).Prepend(new Size(batch)));
                throw new ArgumentException(
                    $"{spec.Name} has {numbers.Length} numbers, and the model takes a multiple of {one} "
                    + $"(float32 [{sizes}]); give whole frames");
            }
            return EdificeTensor.Of(numbers, shape);
        }

        /// <summary>Options of a run that logs nothing: what goes wrong is thrown.</summary>
        internal static RunOptions QuietRun()
        {
            return new RunOptions { LogSeverityLevel = OrtLoggingLevel.ORT_LOGGING_LEVEL_FATAL };
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

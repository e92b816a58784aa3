using System;
using System.Collections.Generic;
using System.IO;
using System.Linq;
using System.Text.Json;
using System.Text.RegularExpressions;
using Microsoft.ML.OnnxRuntime.Tensors;

namespace Edifice
{
    /// <summary>
    /// What manifest.json says. It is not trusted: what could not be is refused, and paths stay inside.
    /// </summary>
    internal sealed class Manifest
    {
        private const int MaxSize = 1 << 20; // of what a graph is made for

        private static readonly string[] Known = { "window", "stream", "prefill" };

        private static readonly Regex Symbol = new Regex(@"^[A-Za-z_]\w*\z");

        private readonly string folder;

        /// <exception cref="NotSupportedException">It has a schema that this program does not read.</exception>
        /// <exception cref="InvalidDataException">It is damaged.</exception>
        public Manifest(string folder, JsonElement manifest)
        {
            this.folder = folder;
            CheckSchema(Field(manifest, "schema_version").GetInt32());
            foreach (JsonProperty file in Field(manifest, "files").EnumerateObject())
            {
                string sha256 = Sha256(file.Value, file.Name);
                Files[Inside(file.Name)] = (Field(file.Value, "size").GetInt64(), sha256);
            }
            JsonElement program = Field(manifest, "program");
            (Kind, Name) = (Text(Field(program, "kind")), Text(Field(program, "name")));
            JsonElement reference = Field(manifest, "reference");
            Weights = reference.ValueKind == JsonValueKind.Null
                ? Sha256(Field(manifest, "weights"), "weights")
                : Files[Listed(Text(reference))].Sha256;
            foreach (JsonProperty size in Field(manifest, "sizes").EnumerateObject())
            {
                Sizes[IsSymbol(size.Name)] = Within(size.Value, size.Name, MaxSize);
            }
            JsonElement frames = Field(manifest, "frames");
            if (frames.ValueKind != JsonValueKind.Null)
            {
                Frames = Text(frames);
                WindowSize = Sizes.TryGetValue(Frames, out int size)
                    ? size
                    : throw Damaged($"frames is '{Frames}', which is none of the sizes");
            }
            States = Field(manifest, "states").EnumerateArray().Select(ReadState).ToArray();
            foreach (JsonProperty graph in Field(manifest, "graphs").EnumerateObject())
            {
                Graphs[graph.Name] = ReadGraph(graph.Name, graph.Value);
            }
            CheckGraphs();
        }

        public Dictionary<string, (long Size, string Sha256)> Files { get; } =
            new Dictionary<string, (long Size, string Sha256)>();

        public Dictionary<string, GraphSpec> Graphs { get; } = new Dictionary<string, GraphSpec>();
        public Dictionary<string, int> Sizes { get; } = new Dictionary<string, int>();
        public string Kind { get; }
        public string Name { get; }
        public string? Frames { get; }
        public int WindowSize { get; } = 1;
        public string Weights { get; }
        public StateSpec[] States { get; }

        /// <summary>A path that the manifest vouches for.</summary>
        public string Listed(string path)
        {
            return Files.ContainsKey(Inside(path))
                ? path
                : throw Damaged($"'{path}' is used and not listed under files");
        }

        public InvalidDataException Damaged(string problem)
        {
            return new InvalidDataException(
                $"bundle {folder}: manifest.json is damaged: {problem}; build or copy the bundle again");
        }

        private void CheckSchema(int schema)
        {
            const int Read = Bundle.SchemaVersion;
            if (schema > Read)
            {
                throw new NotSupportedException(
                    $"bundle {folder}: has schema {schema}, newer than {Read}, the newest that this program "
                    + "reads; take a newer sample");
            }
            if (schema < Read)
            {
                throw new NotSupportedException(
                    $"bundle {folder}: has schema {schema}, older than {Read}, the only one that this program "
                    + "reads; build the bundle again");
            }
        }

        /// <summary>Refuses graphs that don't belong together.</summary>
        private void CheckGraphs()
        {
            bool streams = Graphs.TryGetValue("stream", out GraphSpec? stream);
            bool prefills = Graphs.TryGetValue("prefill", out GraphSpec? prefill);
            if (Graphs.Count == 0 || streams != States.Length > 0 || (prefills && !streams))
            {
                throw Damaged("it has no graphs, a stream without states, or a prefill without a stream");
            }
            if (streams && !stream!.OwnInputs.Concat(stream.OwnOutputs).All(IsOfBatch))
            {
                throw Damaged("the stream's inputs and outputs should have a batch and then fixed sizes");
            }
            if (prefills && !(prefill!.OwnInputs.Length == stream!.OwnInputs.Length
                && Types(prefill.OwnOutputs).SequenceEqual(Types(stream.OwnOutputs))
                && prefill.OwnInputs.All(each => each.Shape.Length > 1 && each.Shape[0].Symbol != null)))
            {
                throw Damaged("the prefill graph's inputs and outputs are not those of the stream");
            }
        }

        private GraphSpec ReadGraph(string name, JsonElement entry)
        {
            if (!Known.Contains(name))
            {
                throw Damaged($"it has a graph '{name}'");
            }
            int states = name == "window" ? 0 : States.Length;
            InputSpec[] inputs = Field(entry, "inputs").EnumerateArray().Select(ReadInput).ToArray();
            TensorSpec[] outputs = Field(entry, "outputs").EnumerateArray().Select(ReadTensor).ToArray();
            string[] names = inputs.Concat(outputs).Select(tensor => tensor.Name).ToArray();
            if (inputs.Length <= states || outputs.Length <= states || names.Distinct().Count() < names.Length
                || !EndsWith(inputs, States.Take(states).Select(state => state.Past))
                || !EndsWith(outputs, States.Take(states).Select(state => state.Present)))
            {
                throw Damaged($"the {name} graph's inputs and outputs are not those of such a graph");
            }
            JsonElement sequence = Field(entry, "test_sequence");
            var graph = new GraphSpec(Listed(Text(Field(entry, "model"))), inputs, outputs, states)
            {
                TestData = Field(entry, "test_data").EnumerateArray().Select(path => Inside(Text(path))).ToArray(),
                TestSequence = sequence.ValueKind == JsonValueKind.Null
                    ? null
                    : Inside(Text(Field(sequence, "folder"))),
            };
            if (entry.TryGetProperty("weights", out JsonElement weights) && weights.ValueKind != JsonValueKind.Null)
            {
                graph.Weights = Beside(Text(weights), graph.Model);
            }
            foreach (JsonProperty limit in Field(entry, "limits").EnumerateObject())
            {
                graph.Limits[limit.Name] = ReadLimit(limit);
            }
            return graph.TestData.Length > 0 ? graph : throw Damaged($"the {name} graph has no test data");
        }

        /// <summary>A file that the manifest vouches for, in the folder of a model.</summary>
        private string Beside(string weights, string model)
        {
            int folder = model.LastIndexOf('/') + 1;
            bool beside = weights != model && weights.LastIndexOf('/') + 1 == folder
                && string.CompareOrdinal(weights, 0, model, 0, folder) == 0;
            return beside ? Listed(weights) : throw Damaged($"the weights '{weights}' are not a file beside '{model}'");
        }

        private (int Least, int? Most) ReadLimit(JsonProperty limit)
        {
            if (limit.Value.GetArrayLength() != 2)
            {
                throw Damaged($"the limits of {limit.Name} should be the least and the most");
            }
            int least = Within(limit.Value[0], "a limit", int.MaxValue);
            bool endless = limit.Value[1].ValueKind == JsonValueKind.Null;
            return (least, endless ? (int?)null : Within(limit.Value[1], "a limit", int.MaxValue));
        }

        private StateSpec ReadState(JsonElement entry)
        {
            TensorSpec tensor = ReadTensor(entry);
            bool known = tensor.Type == TensorElementType.Float || tensor.Type == TensorElementType.Int64
                || tensor.Type == TensorElementType.Int32;
            int growing = tensor.Shape.Count(size => size.IsPast);
            if (!known || !IsOfBatch(tensor, growing) || growing > 1)
            {
                throw Damaged(
                    $"the state {tensor} should be float32, int64 or int32, and have a batch and then fixed sizes, "
                    + "or one that grows");
            }
            JsonElement initial = Field(entry, "initial");
            if (growing > 0 && !(Sizes.ContainsKey("past") && initial.ValueKind == JsonValueKind.Number))
            {
                throw Damaged($"the state {tensor} grows from nothing: it needs the size past, and no file");
            }
            if (initial.ValueKind == JsonValueKind.String)
            {
                return new StateSpec(tensor, 0, Listed(Text(initial)));
            }
            double number = initial.GetDouble();
            double most = tensor.Type switch
            {
                TensorElementType.Float => float.MaxValue,
                TensorElementType.Int64 => Math.Pow(2, 62),
                _ => int.MaxValue,
            };
            return Math.Abs(number) <= most
                ? new StateSpec(tensor, number, null)
                : throw Damaged($"the state {tensor} starts from {number}");
        }

        private InputSpec ReadInput(JsonElement entry)
        {
            TensorSpec tensor = ReadTensor(entry);
            Size? unknown = tensor.Shape.Where(size => size.Symbol != null && !Sizes.ContainsKey(size.Symbol))
                .Select(size => (Size?)size).FirstOrDefault();
            if (unknown != null)
            {
                throw Damaged($"the input {tensor} has the size {unknown}, which is none of the sizes");
            }
            JsonElement values = Field(entry, "values");
            string kind = Text(Field(values, "kind"));
            Values found = kind switch
            {
                "normal" => Values.Normal,
                "ids" => Values.Ids,
                "integers" => Values.Integers,
                "mask" => Values.Mask,
                _ => throw Damaged($"{tensor.Name} has values of the kind '{kind}'"),
            };
            bool floats = tensor.Type == TensorElementType.Float || tensor.Type == TensorElementType.Float16;
            bool bounded = found == Values.Ids || found == Values.Integers;
            long below = bounded ? Field(values, "below").GetInt64() : 0;
            return floats == (found == Values.Normal) && (!bounded || below > 0)
                ? new InputSpec(tensor, found, below)
                : throw Damaged($"{tensor} can't hold {kind} below {below}");
        }

        private TensorSpec ReadTensor(JsonElement entry)
        {
            string type = Text(Field(entry, "dtype"));
            return new TensorSpec(
                Text(Field(entry, "name")),
                ElementTypes.Parse(type) ?? throw Damaged($"a tensor has the type {type}, and not {ElementTypes.All}"),
                Field(entry, "shape").EnumerateArray().Select(size => size.ValueKind == JsonValueKind.String
                    ? new Size(Text(size)) : new Size(Within(size, "a size", int.MaxValue))).ToArray());
        }

        /// <summary>Whether a tensor is of a frame: the batch, and for each entry fixed sizes.</summary>
        private static bool IsOfBatch(TensorSpec tensor) => IsOfBatch(tensor, 0);

        /// <summary>Whether it has a batch and then fixed sizes, but for so many that grow.</summary>
        private static bool IsOfBatch(TensorSpec tensor, int growing)
        {
            return tensor.Shape.Length > 0 && tensor.Shape[0].Symbol != null && !tensor.Shape[0].IsPast
                && tensor.Shape.Count(size => size.Symbol != null) == 1 + growing;
        }

        private static bool EndsWith(TensorSpec[] tensors, IEnumerable<string> names)
        {
            return tensors.Skip(tensors.Length - names.Count()).Select(tensor => tensor.Name).SequenceEqual(names);
        }

        private static IEnumerable<TensorElementType> Types(TensorSpec[] tensors) => tensors.Select(each => each.Type);

        private JsonElement Field(JsonElement parent, string name)
        {
            return parent.TryGetProperty(name, out JsonElement value) ? value : throw Damaged($"it lacks '{name}'");
        }

        private int Within(JsonElement value, string name, int most)
        {
            int number = value.GetInt32();
            return number >= 1 && number <= most ? number : throw Damaged($"{name} is {number}, and not 1 to {most}");
        }

        private string Text(JsonElement value)
        {
            return value.GetString() ?? throw Damaged("a null stands where a text should");
        }

        private string IsSymbol(string name)
        {
            return Symbol.IsMatch(name) ? name : throw Damaged($"the size '{name}' should be a word");
        }

        private string Sha256(JsonElement entry, string of)
        {
            string sha256 = Text(Field(entry, "sha256"));
            return sha256.Length == 64
                ? sha256.ToLowerInvariant()
                : throw Damaged($"'{of}' has no SHA-256 of 64 digits");
        }

        /// <summary>Refuses a path that could lead out of the bundle, on any system.</summary>
        private string Inside(string path)
        {
            bool plain = path.Length > 0 && !path.StartsWith("/", StringComparison.Ordinal)
                && !path.Any(character => character == '\\' || character == ':' || char.IsControl(character));
            return plain && !path.Split('/').Contains("..")
                ? path
                : throw Damaged($"the path '{path}' leaves the bundle");
        }
    }
}

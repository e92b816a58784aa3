using System;
using System.Collections.Generic;
using System.IO;
using System.Linq;
using System.Security.Cryptography;
using System.Text.Json;
using Microsoft.ML.OnnxRuntime.Tensors;

namespace Edifice
{
    /// <summary>
    /// A folder that edifice-export wrote. The manifest is not trusted: its paths stay in the folder, and a file is
    /// compared with its SHA-256 before it is used.
    /// </summary>
    public sealed class Bundle
    {
        public const int SchemaVersion = 4;

        private readonly Dictionary<string, (long Size, string Sha256)> files =
            new Dictionary<string, (long Size, string Sha256)>();

        private readonly Dictionary<string, GraphSpec> graphs = new Dictionary<string, GraphSpec>();

        private Bundle(string folder, JsonElement manifest)
        {
            Folder = folder;
            CheckSchema(Field(manifest, "schema_version").GetInt32());
            foreach (JsonProperty file in Field(manifest, "files").EnumerateObject())
            {
                string sha256 = Text(Field(file.Value, "sha256"));
                if (sha256.Length != 64)
                {
                    throw Damaged($"'{file.Name}' has no SHA-256 of 64 digits");
                }
                files[Inside(file.Name)] = (Field(file.Value, "size").GetInt64(), sha256.ToLowerInvariant());
            }
            Architecture = Text(Field(manifest, "architecture"));
            WindowSize = Frames(Field(Field(manifest, "options"), "window_size"), "window_size");
            Weights = files[Listed(Text(Field(manifest, "reference")))].Sha256;
            States = Field(manifest, "states").EnumerateArray().Select(ReadState).ToArray();
            foreach (JsonProperty graph in Field(manifest, "graphs").EnumerateObject())
            {
                graphs[graph.Name] = ReadGraph(graph.Name, graph.Value);
            }
            if (graphs.Count == 0 || Has("stream") != Has("prefill") || Has("stream") != States.Count > 0)
            {
                throw Damaged("it has no graphs, or a stream without states or prefill");
            }
        }

        public string Folder { get; }
        public string Architecture { get; }

        /// <summary>Frames in one window.</summary>
        public int WindowSize { get; }

        /// <summary>The SHA-256 of the weights: what tells the states of one bundle from those of another.</summary>
        public string Weights { get; }

        public IReadOnlyList<StateSpec> States { get; }

        /// <summary>The graphs that the bundle has: window; stream and prefill; or all three.</summary>
        public IEnumerable<string> Graphs => graphs.Keys;

        /// <exception cref="DirectoryNotFoundException">There is no such folder.</exception>
        /// <exception cref="FileNotFoundException">The folder is not a bundle.</exception>
        /// <exception cref="NotSupportedException">The bundle has a schema that this program does not read.</exception>
        /// <exception cref="InvalidDataException">The manifest is damaged.</exception>
        public static Bundle Open(string folder)
        {
            if (!Directory.Exists(folder))
            {
                throw new DirectoryNotFoundException(
                    $"bundle {folder}: no such folder; make a bundle with `edifice-export build`");
            }
            string path = Path.Combine(folder, "manifest.json");
            if (!File.Exists(path))
            {
                throw new FileNotFoundException(
                    $"bundle {folder}: has no manifest.json; name a folder that `edifice-export build` wrote");
            }
            try
            {
                using JsonDocument manifest = JsonDocument.Parse(File.ReadAllBytes(path));
                return new Bundle(folder, manifest.RootElement);
            }
            catch (Exception error) when (
                error is JsonException || error is InvalidOperationException || error is FormatException)
            {
                throw new InvalidDataException(
                    $"bundle {folder}: manifest.json is damaged: {error.Message}; build or copy the bundle again",
                    error);
            }
        }

        public bool Has(string graph) => graphs.ContainsKey(graph);

        /// <exception cref="NotSupportedException">The bundle was built without this graph.</exception>
        public GraphSpec Graph(string name)
        {
            return graphs.TryGetValue(name, out GraphSpec? graph)
                ? graph
                : throw new NotSupportedException(
                    $"bundle {Folder}: has no {name} graph, only {string.Join(" and ", Graphs)}; "
                    + "build it with `--graph both`");
        }

        /// <summary>Compares a file with the manifest, and says where it is.</summary>
        /// <exception cref="InvalidDataException">It is missing, or was changed.</exception>
        public string Check(string name)
        {
            (long size, string sha256) = files[Listed(name)];
            string path = Path.Combine(Folder, name.Replace('/', Path.DirectorySeparatorChar));
            if (!File.Exists(path))
            {
                throw new InvalidDataException(
                    $"bundle {Folder}: '{name}' is missing; build or copy the bundle again");
            }
            using FileStream stream = File.OpenRead(path);
            using SHA256 algorithm = SHA256.Create();
            string found = BitConverter.ToString(algorithm.ComputeHash(stream)).Replace("-", "").ToLowerInvariant();
            if (stream.Length != size || found != sha256)
            {
                throw new InvalidDataException(
                    $"bundle {Folder}: '{name}' was changed: its SHA-256 is {found} ({stream.Length} bytes), the "
                    + $"manifest says {sha256} ({size} bytes); build or copy the bundle again");
            }
            return path;
        }

        /// <summary>Compares every file with the manifest.</summary>
        public void CheckAll()
        {
            foreach (string name in files.Keys)
            {
                Check(name);
            }
        }

        /// <summary>
        /// Compares a model with the manifest, with all that is beside it: weights above 2 GiB are in files that it
        /// names itself.
        /// </summary>
        public string CheckModel(GraphSpec graph)
        {
            string place = graph.Model.Substring(0, graph.Model.LastIndexOf('/') + 1);
            string beside = Path.Combine(Folder, place);
            if (Directory.Exists(beside))
            {
                foreach (string path in Directory.EnumerateFiles(beside, "*", SearchOption.AllDirectories))
                {
                    string name = Path.GetRelativePath(Folder, path).Replace(Path.DirectorySeparatorChar, '/');
                    if (!files.ContainsKey(name))
                    {
                        throw Damaged($"'{name}' is beside a model and not listed under files");
                    }
                }
            }
            if (files.ContainsKey(graph.Model + ".data"))
            {
                Check(graph.Model + ".data");
            }
            return Check(graph.Model);
        }

        private void CheckSchema(int schema)
        {
            if (schema > SchemaVersion)
            {
                throw new NotSupportedException(
                    $"bundle {Folder}: has schema {schema}, newer than {SchemaVersion}, the newest that this program "
                    + "reads; take a newer sample");
            }
            if (schema < SchemaVersion)
            {
                throw new NotSupportedException(
                    $"bundle {Folder}: has schema {schema}, older than {SchemaVersion}, the only one that this program "
                    + "reads; build the bundle again");
            }
        }

        private GraphSpec ReadGraph(string name, JsonElement entry)
        {
            if (name != "window" && name != "stream" && name != "prefill")
            {
                throw Damaged($"it has a graph '{name}'");
            }
            if (Field(entry, "test_data").GetArrayLength() == 0)
            {
                throw Damaged($"the {name} graph has no test data");
            }
            JsonElement limit = Field(entry, "max_sequence");
            var graph = new GraphSpec(
                Listed(Text(Field(entry, "model"))),
                Field(entry, "inputs").EnumerateArray().Select(ReadTensor).ToArray(),
                Field(entry, "outputs").EnumerateArray().Select(ReadTensor).ToArray(),
                Field(entry, "test_data").EnumerateArray().Select(folder => Inside(Text(folder))).ToArray(),
                limit.ValueKind == JsonValueKind.Null ? (int?)null : Frames(limit, "max_sequence"));
            JsonElement sequence = Field(entry, "test_sequence");
            if (sequence.ValueKind != JsonValueKind.Null)
            {
                graph.TestSequence = Inside(Text(Field(sequence, "folder")));
            }
            int states = name == "window" ? 0 : States.Count;
            int rank = name == "stream" ? 2 : 3;
            if (graph.Inputs.Length != 1 + states || graph.Outputs.Length != 1 + states
                || graph.Inputs[0].Shape.Length != rank || graph.Inputs[0].Shape[rank - 1] < 1
                || graph.Outputs[0].Shape.Length != 2 || graph.Outputs[0].Shape[1] < 1)
            {
                throw Damaged($"the {name} graph's inputs and outputs are not those of such a graph");
            }
            return graph;
        }

        private StateSpec ReadState(JsonElement entry)
        {
            TensorSpec tensor = ReadTensor(entry);
            if (tensor.Shape.Length < 1 || tensor.Shape[0] != -1 || tensor.Shape.Skip(1).Any(size => size < 1))
            {
                throw Damaged($"the state {tensor.Name} should have a batch and then fixed sizes");
            }
            JsonElement initial = Field(entry, "initial");
            return initial.ValueKind == JsonValueKind.String
                ? new StateSpec(tensor, 0, Listed(Text(initial)))
                : new StateSpec(tensor, initial.GetDouble(), null);
        }

        private TensorSpec ReadTensor(JsonElement entry)
        {
            string type = Text(Field(entry, "dtype"));
            return new TensorSpec(
                Text(Field(entry, "name")),
                type switch
                {
                    "float32" => TensorElementType.Float,
                    "int64" => TensorElementType.Int64,
                    _ => throw Damaged($"a tensor has the type {type}, and this program knows float32 and int64"),
                },
                Field(entry, "shape").EnumerateArray()
                    .Select(size => size.ValueKind == JsonValueKind.String ? -1 : size.GetInt32()).ToArray());
        }

        private JsonElement Field(JsonElement parent, string name)
        {
            return parent.TryGetProperty(name, out JsonElement value) ? value : throw Damaged($"it lacks '{name}'");
        }

        /// <summary>A number of frames, within what edifice-export makes.</summary>
        private int Frames(JsonElement value, string name)
        {
            const int Most = 8192;
            int frames = value.GetInt32();
            return frames >= 1 && frames <= Most
                ? frames
                : throw Damaged($"{name} is {frames}, and not 1 to {Most}");
        }

        private string Text(JsonElement value)
        {
            return value.GetString() ?? throw Damaged("a null stands where a text should");
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

        private string Listed(string path)
        {
            return files.ContainsKey(Inside(path))
                ? path
                : throw Damaged($"'{path}' is used and not listed under files");
        }

        private InvalidDataException Damaged(string problem)
        {
            return new InvalidDataException(
                $"bundle {Folder}: manifest.json is damaged: {problem}; build or copy the bundle again");
        }
    }
}

"""The known circuit is known: it solves the task by the planted route, and plain patching finds that route alone."""

import jax
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.execution.fit_set import component_means
from kvjax.model.decoder import Decoder
from kvjax.model.interventions import ablate_head, ablate_mlp
from kvjax.task.benchmark import Benchmark
from kvjax.task.corruption import PAIR_KINDS, PAIR_ROLES
from kvjax.task.encoding import bucket_by_length, encode_records
from kvjax.task.pair_encoding import encode_pairs
from kvjax.task.pairs import generate_pairs
from kvjax.task.probe_set import generate_probe_set
from kvjax.task.stream import Program, Read, build_record
from kvjax.task.vocabulary import Vocabulary
from tests.oracles.known_circuit import (
    BINDER,
    D_HEAD,
    DISTRACTORS,
    GATE,
    N_HEADS,
    N_LAYERS,
    PLANTED_EDGES,
    PLANTED_NODES,
    RETRIEVER,
    SHOWN_EDGES,
    SHOWN_NODES,
    SHOWN_ROLES,
    known_circuit,
)
from tests.oracles.patching import (
    Node,
    Receiver,
    activation_patch,
    all_edges,
    all_nodes,
    forward,
    node_place,
    output_place,
    path_patches,
    stage_place,
    zero_ablate,
)

PAIRS = 4  # of each kind
TRUE, FALSE = 0.99, 0.01  # recovery of every read: planted ones above the first, all others below the second


@pytest.fixture(scope="module")
def benchmark(small_benchmark):
    return Benchmark.open(small_benchmark)


@pytest.fixture(scope="module")
def circuit(benchmark):
    return known_circuit(benchmark.vocabulary)


@pytest.fixture(scope="module")
def module(circuit):
    return circuit.torch_module()


@pytest.fixture(scope="module")
def records(benchmark):
    """All records of all splits, as arrays."""
    found = [record for split in benchmark.split_sizes for record in benchmark.read_split(split)]
    return encode_records(found, benchmark.vocabulary, list(benchmark.split_sizes), max_seq_len=64)


@pytest.fixture(scope="module")
def pairs(benchmark, tmp_path_factory):
    """kind -> encoded pairs."""
    path = tmp_path_factory.mktemp("circuit") / "probe.jsonl"
    probe = generate_probe_set(benchmark, path, examples_per_split=10, fit_examples=8, seed=17)
    made = generate_pairs(probe, benchmark, pairs_per_kind=PAIRS)
    return {kind: encode_pairs(made.of_kind(kind), benchmark.vocabulary, max_seq_len=64) for kind in PAIR_KINDS}


def reads_of(logits, encoded):
    """Returns the logits at every read's p_e, [reads, V], and the answers."""
    n, q = np.nonzero(encoded.is_read)
    return logits[n, encoded.prediction_positions[n, q]], torch.tensor(encoded.answers[n, q], dtype=torch.long)


def accuracy(logits, encoded):
    at_reads, answers = reads_of(logits, encoded)
    return float((at_reads.argmax(-1) == answers).float().mean())


def margins(logits, encoded, vocabulary):
    """Returns logit(answer) less the largest of another value, by read."""
    at_reads, answers = reads_of(logits, encoded)
    right = at_reads.gather(1, answers[:, None])
    others = at_reads.scatter(1, answers[:, None], -torch.inf)[:, torch.tensor(vocabulary.value_ids, dtype=torch.long)]
    return (right[:, 0] - others.max(1).values).numpy()


def run(module, encoded, node=None):
    tokens = torch.tensor(encoded.tokens)
    return module(tokens) if node is None else zero_ablate(module, tokens, node)


class TestOracle:
    def test_written_out_forward(self, module, pairs):
        """The oracle's written-out forward pass is the module's."""
        tokens = torch.tensor(pairs["swap"].clean_tokens)
        torch.testing.assert_close(forward(module, tokens)["out",], module(tokens), atol=1e-4, rtol=1e-5)

    def test_self_patching(self, module, pairs):
        """Patching a run into itself changes nothing."""
        tokens = torch.tensor(pairs["value"].clean_tokens)
        clean = forward(module, tokens)["out",]
        for stage in SHOWN_ROLES["value"]:
            assert torch.equal(activation_patch(module, tokens, tokens, stage_place(stage)), clean)
        edges = list(all_edges(N_LAYERS, N_HEADS))[::20]
        assert all(torch.equal(out, clean) for out in path_patches(module, tokens, tokens, edges))

    def test_whole_stage(self, module, pairs):
        """A whole stage taken from the source gives the source's output."""
        base, source = (torch.tensor(t) for t in (pairs["swap"].corrupted_tokens, pairs["swap"].clean_tokens))
        wanted = forward(module, source)["out",]
        for stage in SHOWN_ROLES["swap"]:
            torch.testing.assert_close(activation_patch(module, base, source, stage_place(stage)), wanted)

    def test_path_to_the_logits(self, module, pairs):
        """A path to the logits skips everything between."""
        base, source = (torch.tensor(t) for t in (pairs["swap"].corrupted_tokens, pairs["swap"].clean_tokens))
        sent, own = forward(module, source), forward(module, base)
        for sender in list(all_nodes(N_LAYERS, N_HEADS))[::4]:
            place = output_place(sender)
            final = own["post_mlp", N_LAYERS - 1] + sent[place] - own[place]
            (path,) = path_patches(module, base, source, [(sender, Receiver("logits"))])
            torch.testing.assert_close(path, module.lm_head(module.final_norm(final)), atol=1e-4, rtol=1e-4)

    def test_all_paths_of_a_node(self, module, pairs):
        """All paths of a node together are the patch of its output."""
        # Every receiver that a head of the second layer has, edited at once: what the sender's output reaches.
        base, source = (torch.tensor(t) for t in (pairs["swap"].corrupted_tokens, pairs["swap"].clean_tokens))
        sender = BINDER
        change = forward(module, source)[output_place(sender)] - forward(module, base)[output_place(sender)]
        receivers = [receiver for node, receiver in all_edges(N_LAYERS, N_HEADS) if node == sender]
        z = forward(module, source)[node_place(sender)]
        patched = forward(module, base, {node_place(sender): lambda _: z})
        # The receivers' other inputs change too when the output itself is patched: give them those of that run.
        own = forward(module, base)
        for receiver in receivers:
            downstream = patched[tuple(receiver)] - own[tuple(receiver)] - change
            assert (downstream.abs().max() < 1e-4) == (receiver == Receiver("mlp", 1)), receiver
        edits = {tuple(r): lambda _, r=r: patched[tuple(r)] for r in receivers}
        torch.testing.assert_close(forward(module, base, edits)["out",], patched["out",], atol=1e-4, rtol=1e-4)

    def test_path_of_the_last_mlp(self, module, pairs):
        """The last MLP's only path is the patch of its output."""
        base, source = (torch.tensor(t) for t in (pairs["query"].corrupted_tokens, pairs["query"].clean_tokens))
        writer = Node("mlp", N_LAYERS - 1)
        (path,) = path_patches(module, base, source, [(writer, Receiver("logits"))])
        patch = activation_patch(module, base, source, node_place(writer))
        torch.testing.assert_close(path, patch, atol=1e-4, rtol=1e-4)

    def test_number_of_edges(self):
        """Edges lead forward, and there are as many as counted by hand."""
        edges = list(all_edges(3, 4))
        assert len(set(edges)) == len(edges)
        # Embedding: 36 head inputs, 3 MLPs, logits. A head of layer 0, 1, 2: 24, 12, 0 head inputs; 3, 2, 1 MLPs;
        # logits. The MLP of layer 0, 1, 2: 24, 12, 0 head inputs; 2, 1, 0 MLPs; logits.
        assert len(edges) == 40 + 4 * (28 + 15 + 2) + (27 + 14 + 1)
        assert set(PLANTED_EDGES) <= set(edges)


class TestTask:
    def test_answers_of_every_split(self, module, records, benchmark):
        """The circuit answers every read of every split."""
        clean = run(module, records)
        assert accuracy(clean, records) == 1.0
        assert margins(clean, records, benchmark.vocabulary).min() > 8.0

    @pytest.mark.parametrize("name", PLANTED_NODES)
    def test_without_a_planted_component(self, module, records, name):
        """Without one planted component it does no better than chance."""
        # 48 values; four times as many right as guessing would have.
        assert accuracy(run(module, records, PLANTED_NODES[name]), records) < 4 / 48

    def test_without_a_distractor(self, module, records, benchmark):
        """Without a distractor every answer stays, and the margins nearly do."""
        clean = margins(run(module, records), records, benchmark.vocabulary)
        for node in DISTRACTORS:
            ablated = run(module, records, node)
            assert accuracy(ablated, records) == 1.0, node
            change = margins(ablated, records, benchmark.vocabulary) - clean
            assert np.abs(change / clean).max() < 0.02, node

    def test_constant_of_a_role(self, circuit, module, records, benchmark):
        """The gate writes one vector at every key of a write, so its role mean does what it does; no other's does."""
        train = encode_records(benchmark.read_split("train")[:20], benchmark.vocabulary, ["train"], max_seq_len=64)
        (bucket,) = bucket_by_length(train, tokens_per_batch=10 * train.tokens.shape[1], max_buckets=1)
        find = jax.jit(lambda params: component_means(params, circuit.config, bucket.batches, features=False)[0])
        means = jax.device_get(find(circuit.params)).by_role
        records = records.take(np.arange(0, len(records), 4))
        for name, node in PLANTED_NODES.items():
            of_component = (
                means["mlp_out"][node.layer] if node.kind == "mlp" else means["head_z"][:, :, node.head][node.layer]
            )
            put_in = torch.tensor(of_component[records.token_roles])
            replaced = forward(module, torch.tensor(records.tokens), {node_place(node): lambda _, x=put_in: x})["out",]
            if name == "gate":  # without it nothing is right, see `test_without_a_planted_component`
                assert accuracy(replaced, records) == 1.0
            else:
                assert accuracy(replaced, records) < 4 / 48, name

    def test_attention_of_planted_heads(self, module, records):
        """Each planted head attends to its planted position."""
        trace = {}
        module(torch.tensor(records.tokens), trace)
        pattern = {node: trace["pattern"][node.layer][:, node.head] for node in (GATE, BINDER, RETRIEVER)}
        n, q = np.nonzero(records.is_read)
        at, support = records.prediction_positions[n, q], records.support_positions[n, q]
        assert pattern[GATE][n, support - 1, support - 2].min() > 0.999
        assert pattern[BINDER][n, support, support - 1].min() > 0.999
        assert pattern[BINDER][n, at + 1, 0].min() > 0.999, "an answer is bound to nothing"
        assert pattern[RETRIEVER][n, at, support].min() > 0.999

    @pytest.mark.parametrize("seed", [0, 1])
    @settings(max_examples=30, deadline=None)
    @given(st.data())
    def test_any_stream_of_the_largest_vocabulary(self, large_modules, seed, data):
        """The circuit solves any stream of the largest vocabulary."""
        vocabulary = Vocabulary.of_size(8, 128)
        keys = data.draw(st.lists(st.integers(0, 7), min_size=1, max_size=20))
        values = data.draw(st.lists(st.integers(0, 127), min_size=len(keys), max_size=len(keys), unique=True))
        writes = tuple((f"K{key:02d}", f"V{value:03d}") for key, value in zip(keys, values, strict=True))
        slots = sorted(data.draw(st.lists(st.integers(0, len(keys) - 1), min_size=1, max_size=11)))
        reads = []
        for slot in slots:
            key = writes[data.draw(st.integers(0, slot))][0]
            reads.append(Read(slot, key, max(i for i in range(slot + 1) if writes[i][0] == key)))
        program = Program(writes, tuple(reads))
        record = build_record(program, vocabulary, sample_id="x", split="x", heldout_pairs=frozenset())
        encoded = encode_records([record], vocabulary, ["x"], max_seq_len=96)
        assert accuracy(run(large_modules[seed], encoded), encoded) == 1.0


@pytest.fixture(scope="module")
def large_modules():
    return [known_circuit(Vocabulary.of_size(8, 128), max_seq_len=96, seed=seed).torch_module() for seed in (0, 1)]


class TestFlax:
    def test_both_frameworks(self, circuit, module, records):
        """Flax and PyTorch give the same logits."""
        tokens = records.tokens[::16]
        logits, _ = jax.jit(Decoder(circuit.config).apply)({"params": circuit.params}, tokens)
        wanted = module(torch.tensor(tokens)).numpy()
        is_token = tokens != 0
        np.testing.assert_allclose(np.asarray(logits)[is_token], wanted[is_token], atol=1e-3)

    @pytest.mark.parametrize("node", [Node("head", 1, 2), Node("mlp", 1)], ids=lambda node: node.kind)
    def test_ablation_of_a_silent_component(self, circuit, records, node):
        """Ablating a component whose weights are zero changes no bit."""
        params = jax.tree.map(np.array, circuit.params)
        if node.kind == "head":
            params["blocks"]["attn"]["out_proj"]["kernel"][
                node.layer, node.head * D_HEAD : (node.head + 1) * D_HEAD
            ] = 0
            edits = ablate_head(node.layer, node.head, n_layers=N_LAYERS, n_heads=N_HEADS)
        else:
            for leaf in params["blocks"]["mlp"]["fc_out"].values():
                leaf[node.layer] = 0
            edits = ablate_mlp(node.layer, n_layers=N_LAYERS)
        tokens = records.tokens[::16]
        apply = jax.jit(Decoder(circuit.config).apply)
        clean, _ = apply({"params": params}, tokens)
        ablated, _ = apply({"params": params}, tokens, edits)
        assert np.array_equal(np.asarray(clean), np.asarray(ablated))


class TestPatching:
    """Plain patching finds what was planted and nothing else, read by read, in both directions."""

    @staticmethod
    def metric(logits, encoded):
        n, q = np.nonzero(encoded.is_affected)
        at = logits[n, encoded.prediction_positions[n, q]]
        rows = np.arange(len(n))
        return (at[rows, encoded.clean_answers[n, q]] - at[rows, encoded.corrupted_answers[n, q]]).numpy()

    @pytest.fixture(params=[(kind, way) for kind in PAIR_KINDS for way in ("restore", "corrupt")], ids="-".join)
    def case(self, request, pairs, module):
        """kind, pairs, tokens to run, tokens to take from, and the recovery of every affected read."""
        kind, way = request.param
        encoded = pairs[kind]
        tokens = [torch.tensor(encoded.corrupted_tokens), torch.tensor(encoded.clean_tokens)]
        base, source = tokens if way == "restore" else tokens[::-1]
        start, end = self.metric(module(base), encoded), self.metric(module(source), encoded)
        assert (np.abs(end - start) > 10).all(), "every answer changes, by a lot"
        return kind, encoded, base, source, lambda logits: (self.metric(logits, encoded) - start) / (end - start)

    @staticmethod
    def check(recovery, is_true, what):
        if is_true:
            assert recovery.min() > TRUE and recovery.max() < 2 - TRUE, what
        else:
            assert np.abs(recovery).max() < FALSE, what

    def test_paths(self, case, module):
        """Plain path patching shows every planted path, and no other."""
        kind, _, base, source, recovery_of = case
        edges = list(all_edges(N_LAYERS, N_HEADS))
        for edge, logits in zip(edges, path_patches(module, base, source, edges), strict=True):
            self.check(recovery_of(logits), edge in SHOWN_EDGES[kind], edge)

    def test_nodes(self, case, module):
        """Plain activation patching shows every planted component, and no other."""
        kind, _, base, source, recovery_of = case
        for node in list(all_nodes(N_LAYERS, N_HEADS))[1:]:
            patched = activation_patch(module, base, source, node_place(node))
            self.check(recovery_of(patched), node in SHOWN_NODES[kind], node)

    def test_stages_by_role(self, case, module):
        """Each stage holds the change at the planted role's positions."""
        kind, encoded, base, source, recovery_of = case
        unpatched = forward(module, base)["out",]
        for stage, holder in SHOWN_ROLES[kind].items():
            for index, role in enumerate(PAIR_ROLES):
                mask = torch.tensor(encoded.roles == index)
                patched = activation_patch(module, base, source, stage_place(stage), mask)
                self.check(recovery_of(patched), role == holder, (stage, role))
                if role == "before":
                    assert torch.equal(patched, unpatched), "both runs are the same there"


def test_distractors_feel_the_corruptions(module, pairs):
    """Nothing is below the threshold only because it never changed."""
    for node in DISTRACTORS:
        changes = []
        for encoded in pairs.values():
            runs = [
                forward(module, torch.tensor(t))[output_place(node)]
                for t in (encoded.clean_tokens, encoded.corrupted_tokens)
            ]
            changes.append(float((runs[0] - runs[1]).norm(dim=-1).max() / runs[0].norm(dim=-1).mean()))
        assert max(changes) > 0.1, node

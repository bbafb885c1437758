"""Tasks, patching, contrastive routes, agreement and faithfulness; a planted circuit is found."""

from __future__ import annotations

import csv
import importlib.util
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted_circuit import CIRCUIT, induction_model, induction_task
from tiny import tiny_model, tiny_text
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from ifr_fast import Tracer, circuits
from ifr_fast.circuits import (
    Components,
    Prompt,
    Settings,
    Task,
    attention_selection,
    attention_weights,
    auc,
    components,
    contrastive,
    membership,
    patch,
    random_selection,
    selected,
    survival,
)
from ifr_fast.circuits.agreement import bootstrap, ranks, share_interval
from ifr_fast.circuits.inputs import (
    METHODS,
    _curves,
    deletion_groups,
    direct_reads,
    insertion_area,
    mass_left,
    rise_and_mas,
)
from ifr_fast.circuits.published import GPT2_SMALL, as_mask, published_circuit
from ifr_fast.circuits.tasks import EVENTS, IOI_TEMPLATES, NAMES, OBJECTS, PLACES
from ifr_fast.cli import app
from ifr_fast.errors import FormatError
from ifr_fast.storage import load_tensors


def word_tokenizer(digits: str = r"\d{2}", but: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """One token a word, numbers in pieces of `digits`; names in `but` are two tokens."""
    words = [*NAMES, *PLACES, *OBJECTS, *EVENTS]
    words += " ".join([*IOI_TEMPLATES, "The with lasted from the year to"]).split()
    words = [w.strip(".,") for w in words if "{" not in w] + [".", ","]
    words += [f"{i:02}" for i in range(100)] + [str(i) for i in range(10)]
    vocabulary = {w: i for i, w in enumerate(dict.fromkeys(["?", *words])) if w not in but}
    for name in but:
        for half in (name[:2], name[2:]):
            vocabulary.setdefault(half, len(vocabulary) + len(but))
    ids = {w: i for i, w in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="?"))
    pieces = "|".join([*(f"{n[:2]}(?={n[2:]})|(?<={n[:2]}){n[2:]}" for n in but)])
    pattern = Regex("|".join(filter(None, [pieces, digits, r"[A-Za-z]+", r"[.,]"])))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(pattern, "isolated")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")


def word_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return model


# Tasks


def test_ioi_prompts():
    tokenizer = word_tokenizer()
    task = circuits.ioi(tokenizer, 60, seed=3)
    assert len({p.text for p in task.prompts}) == 60
    assert {p.template[:4] for p in task.prompts} == {"ABBA", "BABA"}
    assert len({p.template[6:] for p in task.prompts}) == len(IOI_TEMPLATES)
    for p in task.prompts:
        words = tokenizer.convert_ids_to_tokens(p.token_ids)
        io, s = (tokenizer.convert_ids_to_tokens(x)[0] for x in (p.right, p.wrong))
        assert [words[p.places[k]] for k in ("IO", "S1", "S2")] == [io, s, s]
        assert words.count(io) == 1
        assert words.count(s) == 2
        assert p.places["S2"] > max(p.places["IO"], p.places["S1"])
        assert (p.places["IO"] < p.places["S1"]) == p.template.startswith("ABBA")
        names = [w for w in tokenizer.convert_ids_to_tokens(p.twin_ids) if w in NAMES]
        assert len(set(names)) == 3
        assert not {io, s} & set(names)
        assert len(p.twin_ids) == len(p.token_ids) == p.places["END"] + 1
        assert p.token_ids[: p.first_difference] == p.twin_ids[: p.first_difference]
        assert p.first_difference == min(p.places["IO"], p.places["S1"])
        for reference in p.references:
            assert len(reference) == len(p.token_ids)
            assert not {p.right[0], p.wrong[0]} & set(reference)
    again = circuits.ioi(tokenizer, 60, seed=3)
    assert again == task
    assert circuits.ioi(tokenizer, 60, seed=4) != task


def test_the_swapped_twin_asks_for_the_other_name():
    task = circuits.ioi(word_tokenizer(), 10, twin="swap")
    for p in task.prompts:
        assert p.first_difference == p.places["S2"]
        assert p.twin_ids[p.places["S2"]] == p.right[0]
        assert sum(a != b for a, b in zip(p.token_ids, p.twin_ids, strict=True)) == 1


def test_names_of_several_tokens_are_left_out():
    but = ("Mary", "Stephanie", "Robert")
    tokenizer = word_tokenizer(but=but)
    assert len(tokenizer(" Mary")["input_ids"]) == 2
    task = circuits.ioi(tokenizer, 200, names=(*but, *NAMES[:12]))
    assert not any(name in p.text + p.twin for p in task.prompts for name in but)
    with pytest.raises(ValueError, match="of 4 names 2 are single tokens"):
        circuits.ioi(tokenizer, 1, names=("Mary", "Robert", "Paul", "Anna"))


def numbers(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[int]:
    return [int(token) for token in tokenizer.convert_ids_to_tokens(ids)]


def test_greater_than_in_pairs_of_digits():
    tokenizer = word_tokenizer()
    task = circuits.greater_than(tokenizer, 40)
    for p in task.prompts:
        year = int(tokenizer.convert_ids_to_tokens(p.token_ids)[p.places["YY"]])
        right, wrong = (numbers(tokenizer, ids) for ids in (p.right, p.wrong))
        assert right == list(range(year + 1, 100))
        assert wrong == list(range(year + 1))
        assert tokenizer.convert_ids_to_tokens(p.twin_ids)[p.places["YY"]] == "01"
        assert len(p.references) == 16
        assert p.token_ids not in p.references


def test_greater_than_digit_by_digit_asks_for_tens():
    tokenizer = word_tokenizer(digits=r"\d")
    task = circuits.greater_than(tokenizer, 30)
    for p in task.prompts:
        tens = int(tokenizer.convert_ids_to_tokens(p.token_ids)[p.places["YY"]])
        right, wrong = (numbers(tokenizer, ids) for ids in (p.right, p.wrong))
        assert right == list(range(tens + 1, 10))
        assert wrong == list(range(tens))
    with pytest.raises(ValueError, match="0 of 3 prompts could be made"):
        circuits.greater_than(word_tokenizer(digits=r"\d{3}|\d"), 3)


def test_logit_difference_and_probability():
    prompts = [
        Prompt("a", "b", [1], [2], right, wrong, [], "", {})
        for right, wrong in (([3], [5]), ([0, 1], [2, 3, 4]))
    ]
    task = Task("made up", 0, prompts)
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    which = torch.tensor([0, 1, 1, 0, 1])
    p = logits.double().softmax(-1)
    for got, chance, row, i in zip(
        task.logit_difference(logits, which), task.probability(logits, which), p, which, strict=True
    ):
        right, wrong = (float(row[x].sum()) for x in (prompts[i].right, prompts[i].wrong))
        assert math.isclose(float(got), math.log(right / wrong), rel_tol=1e-9)
        assert math.isclose(float(chance), right, rel_tol=1e-9)


# Patching


def small_task(n: int = 3) -> Task:
    """Texts of several lengths that differ from their twins from different positions on."""
    prompts = []
    for i in range(n):
        ids = tiny_text(7 + 2 * i, seed=i).tolist()
        twin = [x if t < 2 + i else (x + 5) % 97 for t, x in enumerate(ids)]
        prompts.append(Prompt("", "", ids, twin, [7, 8], [3], [], "", {}))
    return Task("small", 0, prompts)


def swept(tracer: Tracer, task: Task, direction: str, each: bool) -> tuple[Tensor, Tensor]:
    """Effects by one whole run for each patch: no batches, no restarts."""
    decoder = tracer.decoder
    L, H = decoder.n_layers, decoder.n_heads
    T = max(map(len, task.texts)) if each else 1
    heads, ffn = torch.zeros(len(task), L, H, T), torch.zeros(len(task), L, T)
    for i, prompt in enumerate(task.prompts):
        texts = (prompt.twin_ids, prompt.token_ids)
        base, source = texts if direction == "denoise" else texts[::-1]
        taken = circuits.observe(decoder, [source])
        which = torch.tensor([i])
        before = task.logit_difference(circuits.run(decoder, [base]), which)
        spans = [slice(t, t + 1) for t in range(len(base))] if each else [slice(None)]
        for (t, span), layer in itertools.product(enumerate(spans), range(L)):
            for head in range(H + 1):  # the last is the FFN

                def edit(at: int, z: Tensor, of=(layer, span, head), taken=taken) -> Tensor:
                    z = z.clone()
                    if at == of[0]:
                        z[:, of[1], of[2]] = taken.z[at][:, of[1], of[2]]
                    return z

                def edit_ffn(at: int, x: Tensor, of=(layer, span), taken=taken) -> Tensor:
                    x = x.clone()
                    if at == of[0]:
                        x[:, of[1]] = taken.ffn[at][:, of[1]]
                    return x

                edits = {"heads": edit} if head < H else {"ffn": edit_ffn}
                after = task.logit_difference(circuits.run(decoder, [base], **edits), which)
                effect = float(after - before) * (1 if direction == "denoise" else -1)
                if head < H:
                    heads[i, layer, head, t] = effect
                else:
                    ffn[i, layer, t] = effect
    return (heads, ffn) if each else (heads[..., 0], ffn[..., 0])


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("positions", ["all", "each"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gptj"])
def test_sweeps_are_those_of_whole_runs_one_by_one(family, positions, direction):
    tracer = Tracer(tiny_model(family, dtype=torch.float64))
    task = small_task(1 if family == "gptj" else 2)
    paired = direction == "denoise"
    got = patch(tracer.decoder, task, direction=direction, positions=positions, paired=paired)
    heads, ffn = swept(tracer, task, direction, positions == "each")
    assert heads.abs().max() > 0.01
    torch.testing.assert_close(got.heads.float(), heads, atol=1e-5, rtol=0)
    torch.testing.assert_close(got.ffn.float(), ffn, atol=1e-5, rtol=0)
    if positions == "each":
        torch.testing.assert_close(got.summed().heads.float(), heads.sum(-1), atol=1e-4, rtol=0)


def test_patching_a_text_with_its_own_activations_has_no_effect():
    """In float32, at every position and in batches of every size; twins that do not differ, and
    twins that do, whose own activations are put in.
    """
    decoder, task = Tracer(tiny_model("llama")).decoder, small_task()
    same = Task("same", 0, [replace(p, twin_ids=p.token_ids) for p in task.prompts])
    assert [p.first_difference for p in same.prompts] == [len(p.token_ids) for p in same.prompts]
    effects = patch(decoder, same)
    assert not effects.heads.any()
    assert not effects.ffn.any()
    seen = circuits.observe(decoder, task.texts)
    with circuits.restarting(decoder):
        for layer, t, n in itertools.product((0, 2), (0, 6), (1, 5, 11)):
            of = torch.arange(3).repeat(4)[:n]
            z = seen.z[layer][of, t : t + 1]
            got = seen.restart(layer, of, t, t + 1, z=z)
            assert (got - seen.logits[of]).abs().max() <= 1e-6
            z = z.clone()
            z[:, :, 1] = 0
            alone = seen.restart(layer, of, t, t + 1, z=z, paired=False)
            paired = seen.restart(layer, of, t, t + 1, z=z)
            torch.testing.assert_close(paired, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.default_model
@pytest.mark.parametrize("make", [circuits.ioi, circuits.greater_than])
def test_own_activations_change_no_logit_of_the_default_model(smol, make):
    """Restarted at any position, in batches of any size; against the model's own logits."""
    decoder = smol.decoder
    for text in make(smol.tokenizer, 2, seed=0).texts:
        seen, T = circuits.observe(decoder, [text]), len(text)
        plain = smol.model(input_ids=torch.tensor([text])).logits[:, -1]
        with circuits.restarting(decoder):
            for layer, t, n in itertools.product((0, 15), (0, T // 2, T - 3, T - 1), (1, 4)):
                of = torch.zeros(n, dtype=torch.int64)
                z = seen.z[layer][of, t : t + 1]
                got = seen.restart(layer, of, t, t + 1, z=z)
                assert (got - plain).abs().max() <= 1e-5


def test_ablation_sweeps():
    """Against masks of whole runs."""
    tracer = Tracer(tiny_model("llama", dtype=torch.float64))
    decoder, task = tracer.decoder, small_task()
    values = circuits.mean_activations(decoder, task.twins)
    got = circuits.ablate(decoder, task, values)
    which = torch.arange(len(task))
    L, H = decoder.n_layers, decoder.n_heads
    plain = task.logit_difference(circuits.run(decoder, task.texts), which)
    for layer, head in itertools.product(range(L), range(H + 1)):
        heads = torch.zeros(len(task), L, H, dtype=torch.bool)
        ffn = torch.zeros(len(task), L, dtype=torch.bool)
        if head < H:
            heads[:, layer, head] = True
        else:
            ffn[:, layer] = True
        logits = circuits.ablated_logits(decoder, task.texts, values, heads, ffn)
        expected = plain - task.logit_difference(logits, which)
        effect = got.heads[:, layer, head] if head < H else got.ffn[:, layer]
        torch.testing.assert_close(effect, expected, atol=1e-6, rtol=0)


def test_a_patched_last_layer_is_felt_at_the_last_position_alone():
    decoder, task = Tracer(tiny_model("gpt2", dtype=torch.float64)).decoder, small_task()
    effects = patch(decoder, task, positions="each")
    for i, text in enumerate(task.texts):
        last = effects.heads[i, -1]
        assert (last[:, : len(text) - 1] == 0).all()
        assert (last[:, len(text) - 1] != 0).any()
        assert (effects.heads[i, :, :, : task.prompts[i].first_difference] == 0).all()
        assert (effects.heads[i, :, :, len(text) :] == 0).all()


def test_an_interrupted_sweep_goes_on(tmp_path, monkeypatch):
    decoder, task = Tracer(tiny_model("llama")).decoder, small_task()
    whole = patch(decoder, task)
    done: list[int] = []
    own = circuits.patching._patch_layer

    def breaking(base, layer, *args):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(layer)
        return own(base, layer, *args)

    monkeypatch.setattr("ifr_fast.circuits.patching._patch_layer", breaking)
    with pytest.raises(KeyboardInterrupt):
        patch(decoder, task, checkpoint=tmp_path)
    assert done == [0, 1]
    done.clear()
    done.append(-1)
    got = patch(decoder, task, checkpoint=tmp_path)
    assert done == [-1, 2]
    assert torch.equal(got.heads, whole.heads)
    assert torch.equal(got.ffn, whole.ffn)
    assert (got.runs, got.passes) == (whole.runs, whole.passes)
    again = patch(decoder, task, checkpoint=tmp_path)
    kept = [load_tensors(x, "ifr_fast.patching", 1)[1]["seconds"] for x in tmp_path.iterdir()]
    assert again.seconds > sum(kept) > 0
    with pytest.raises(FormatError, match="of another model, task or kind"):
        patch(decoder, task, direction="noise", checkpoint=tmp_path)


def test_arguments_of_patch():
    decoder, task = Tracer(tiny_model("llama")).decoder, small_task()
    for wrong in ({"direction": "up"}, {"positions": "some"}, {"layers": [7]}, {"layers": []}):
        (name,) = wrong
        with pytest.raises(ValueError, match=f"{name}: expected"):
            patch(decoder, task, **wrong)
    with pytest.raises(ValueError, match="of all positions at once"):
        patch(decoder, task, layers=[0]).summed()


# The planted circuit


def top(scores: Tensor, k: int = 2) -> set[tuple[int, int]]:
    H = scores.shape[1]
    return {divmod(i, H) for i in scores.flatten().topk(k).indices.tolist()}


def test_patching_and_contrastive_routes_name_the_planted_heads():
    """And plain routes do not: a head that is always active carries more."""
    tracer = Tracer(induction_model())
    task = induction_task(12)
    which = torch.arange(len(task))
    logits = circuits.run(tracer.decoder, task.texts)
    assert logits.argmax(-1).tolist() == [p.right[0] for p in task.prompts]
    assert (task.logit_difference(logits, which) > 5).all()
    for direction in ("denoise", "noise"):
        effects = patch(tracer.decoder, task, direction=direction)
        mean = effects.heads.mean(0) / effects.gap
        assert top(mean.abs()) == CIRCUIT
        for head in CIRCUIT:
            assert mean[head] > 0.9
        mean[tuple(zip(*CIRCUIT, strict=True))] = 0
        assert mean.abs().max() < 0.01
    by_position = patch(tracer.decoder, task, positions="each").heads
    for i, prompt in enumerate(task.prompts):
        assert int(by_position[i, 0, 0].argmax()) == prompt.places["B"]
        assert int(by_position[i, 1, 1].argmax()) == prompt.places["END"]
    for threshold in (0.01, 0.04):
        routes = contrastive(tracer, task, threshold=threshold)
        assert top(routes.heads.mean(0)) == CIRCUIT
        plain = components(tracer.trace(task.texts, threshold=threshold)).heads.mean(0)
        assert top(plain) != CIRCUIT


# Contrastive routes


def test_components_and_membership():
    tracer = Tracer(tiny_model("llama"))
    graphs = tracer.trace([tiny_text(9), tiny_text(12, seed=1)], threshold=0.02)
    importance, frequency = components(graphs), components(graphs, "frequency")
    for i, graph in enumerate(graphs):
        assert torch.equal(importance.heads[i].float(), graph.head_importance())
        assert torch.equal(importance.ffn[i].float(), graph.ffn_importance())
        heads, ffn = membership(graph)
        expected = torch.zeros_like(heads)
        for layer, head, target, _, weight in zip(*graph.head_edges, strict=True):
            if weight > 0.02:
                expected[layer, head, target] = True
        assert torch.equal(heads, expected)
        assert torch.equal(frequency.heads[i] > 0, heads.any(-1))
        assert torch.equal(frequency.ffn[i] > 0, ffn.any(-1))
        assert 0 < int(ffn.sum()) == int((graph.edges.kind == 2).sum())


def test_contrasts_between_texts_and_between_targets():
    tracer = Tracer(tiny_model("gpt2"))
    texts = [tiny_text(8), tiny_text(11, seed=1)]
    twins = [tiny_text(8, seed=2), tiny_text(11, seed=3)]
    got = contrastive(tracer, texts, against=twins, threshold=0.02)
    expected = components(tracer.trace(texts, threshold=0.02)) - components(
        tracer.trace(twins, threshold=0.02)
    )
    assert torch.equal(got.heads, expected.heads)
    targets = contrastive(tracer, texts, position=-1, against_position=3, threshold=0.02)
    at_3 = components(tracer.trace(texts, position=3, threshold=0.02))
    of_last = components(tracer.trace(texts, threshold=0.02))
    assert torch.equal(targets.ffn, of_last.ffn - at_3.ffn)
    same = contrastive(tracer, texts, against=texts, threshold=0.02)
    assert not same.heads.any()
    with pytest.raises(ValueError, match="against: expected as many texts"):
        contrastive(tracer, texts)
    with pytest.raises(ValueError, match="heads' importances"):
        Components(got.heads, got.ffn) - Components(got.heads[:1], got.ffn[:1])
    with pytest.raises(ValueError, match="measure: expected"):
        components(tracer.trace(texts), "flow")


# Agreement

scored = st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=12).filter(
    lambda rows: 0 < sum(hit for _, hit in rows) < len(rows)
)


@given(scored)
@settings(deadline=None, max_examples=60)
def test_roc_curves(rows):
    scores = torch.tensor([float(s) for s, _ in rows])
    hits = torch.tensor([hit for _, hit in rows])
    pairs = [(a > b) + (a == b) / 2 for a, p in rows for b, q in rows if p and not q]
    area = auc(scores, hits)
    assert math.isclose(area, sum(pairs) / len(pairs))
    false, true = circuits.roc_curve(scores, hits)
    assert (float(false[0]), float(true[0]), float(false[-1]), float(true[-1])) == (0, 0, 1, 1)
    assert math.isclose(float(torch.trapezoid(true, false)), area, abs_tol=1e-12)
    assert math.isclose(auc(-scores, hits), 1 - area, abs_tol=1e-12)
    for k in range(1, len(rows) + 1):  # the mean over all ways to break ties
        border = sorted((s for s, _ in rows), reverse=True)[k - 1]
        above = [p for s, p in rows if s > border]
        tied = [p for s, p in rows if s == border]
        ways = [sum(w) for w in itertools.combinations(tied, k - len(above))]
        expected = (sum(above) + sum(ways) / len(ways)) / k
        assert math.isclose(circuits.precision_at(scores, hits, k), expected)


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=10))
@settings(deadline=None, max_examples=40)
def test_rank_correlation(rows):
    def rank(values):
        return [
            1 + sum(b < a for b in values) + (sum(b == a for b in values) - 1) / 2 for a in values
        ]

    x, y = ([float(row[i]) for row in rows] for i in (0, 1))
    assert ranks(torch.tensor(x)).tolist() == rank(x)
    assert ranks(torch.tensor([y, x, x])).tolist() == [rank(y), rank(x), rank(x)]
    both = torch.tensor([rank(x), rank(y)], dtype=torch.float64)
    expected = 0.0
    if all(len(set(v)) > 1 for v in (x, y)):
        expected = float(torch.corrcoef(both)[0, 1])
    got = circuits.rank_correlation(torch.tensor(x), torch.tensor(y))
    assert math.isclose(got, expected, abs_tol=1e-9)


def test_bootstrap_intervals_cover():
    """Of the mean of normal numbers: near the textbook's, and 95% of them hold the truth."""
    generator = torch.Generator().manual_seed(0)
    held = 0
    for i in range(60):
        x = torch.randn(40, generator=generator, dtype=torch.float64)
        found = bootstrap(lambda c, x=x: x[c].mean(-1), 40, draws=300, seed=i)
        assert math.isclose(found.value, float(x.mean()))
        assert abs((found.high - found.low) - 2 * 1.96 * float(x.std()) / 40**0.5) < 0.2
        held += found.low <= 0 <= found.high
    assert held >= 51
    nothing = bootstrap(lambda c: torch.where(c[:, 0] % 2 > 0, torch.nan, 1.0), 5, draws=50)
    assert (nothing.low, nothing.high) == (1, 1)


def test_intervals_of_shares():
    """Wilson's: the shares p for which the share found is z standard errors of p away."""
    for hits, n in ((0, 12), (7, 12), (50, 50), (48, 50)):
        found = share_interval(torch.arange(n) < hits)
        assert found.value == hits / n
        for edge in (found.low, found.high):
            error = (edge * (1 - edge) / n) ** 0.5
            at_the_end = edge in (0, 1) and edge == found.value
            assert at_the_end or abs(abs(edge - found.value) - 1.959964 * error) < 1e-6
    assert math.isnan(share_interval(torch.zeros(0, dtype=torch.bool)).value)


def test_agreement_of_scores_with_effects():
    generator = torch.Generator().manual_seed(0)
    truth = torch.zeros(30, dtype=torch.float64)
    truth[:6] = torch.tensor([0.5, -0.4, 0.3, 0.2, 0.15, -0.1])
    effects = truth + 0.01 * torch.randn(20, 30, generator=generator)
    good = truth.abs() + 0.02 * torch.randn(20, 30, generator=generator)
    found = circuits.agreement(good, effects, least=0.05, ks=(3, 6, 99), draws=200)
    assert (found.n_positive, found.n_components) == (6, 30)
    assert found.auc.value == found.precision[6].value == 1
    assert list(found.precision) == [3, 6]
    blind = torch.randn(20, 30, generator=generator)
    poor = circuits.agreement(blind, effects, least=0.05, draws=200)
    assert poor.auc.low < poor.auc.value < poor.auc.high < 1
    # By one draw at a time: AUC of a draw's means, positives found anew.
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for chosen in torch.randint(20, (200, 20), generator=generator):
        size = effects[chosen].mean(0).abs()
        drawn.append(auc(blind[chosen].mean(0), size >= 0.05))
    expected = torch.tensor(drawn, dtype=torch.float64).quantile(
        torch.tensor([0.025, 0.975]).double()
    )
    assert [poor.auc.low, poor.auc.high] == pytest.approx(expected.tolist(), abs=1e-9)
    # In shares of what there was to restore, whose mean is drawn anew, too.
    gap = 4 + 3 * torch.rand(20, generator=generator, dtype=torch.float64)
    shared = circuits.agreement(blind, effects, least=0.05 / 4.7, gap=gap, draws=200)
    generator, drawn = torch.Generator().manual_seed(0), []
    for chosen in torch.randint(20, (200, 20), generator=generator):
        size = (effects[chosen].mean(0) / gap[chosen].mean()).abs()
        drawn.append(auc(blind[chosen].mean(0), size >= 0.05 / 4.7))
    expected = torch.tensor(drawn, dtype=torch.float64).quantile(
        torch.tensor([0.025, 0.975]).double()
    )
    assert [shared.auc.low, shared.auc.high] == pytest.approx(expected.tolist(), abs=1e-9)
    assert shared.n_positive == int((effects.mean(0).abs() / gap.mean() >= 0.05 / 4.7).sum())
    with pytest.raises(ValueError, match=r"gap: expected \[20\], got \[3\]"):
        circuits.agreement(good, effects, least=0.05, gap=gap[:3])
    undefined = circuits.agreement(good, effects, least=9, draws=20)
    assert math.isnan(undefined.auc.value)
    with pytest.raises(ValueError, match="scores: expected"):
        circuits.agreement(good[:, :5], effects, least=0.05)


def test_published_heads_are_compared_when_the_model_is_theirs():
    """With a stand-in for the table: CI downloads no GPT-2."""
    for name in GPT2_SMALL:
        assert published_circuit("ioi", name)["name mover"] == ((9, 9), (9, 6), (10, 0))
        assert published_circuit("greater-than", name) is not None
    assert published_circuit("ioi", None) is published_circuit("ioi", "gpt2-medium") is None
    assert published_circuit("induction", "gpt2") is None
    assert int(as_mask(published_circuit("ioi", "gpt2"), 12, 12).sum()) == 26
    stand_in = {"previous token": ((0, 0),), "induction": ((1, 1),)}
    mask = as_mask(stand_in, 2, 3)
    assert {tuple(x) for x in mask.nonzero().tolist()} == CIRCUIT
    tracer, task = Tracer(induction_model()), induction_task(6)
    routes = contrastive(tracer, task)
    found = circuits.agreement_with(routes.heads.flatten(1), mask.flatten(), ks=(2,), draws=50)
    assert found.auc.value == found.precision[2].value == 1
    with pytest.raises(ValueError, match="expected 2 layers of 3 heads, got induction"):
        as_mask({"induction": ((5, 5),)}, 2, 3)


# Keep-only


def test_attention_weights_are_those_of_the_model():
    for family in ("llama", "gpt2", "mistral", "gemma2", "bloom", "gpt_oss"):
        model = tiny_model(family).eval()
        text = tiny_text(12)
        got = attention_weights(Tracer(model).decoder, text)
        model.config._attn_implementation = "eager"
        with torch.no_grad():
            expected = model(input_ids=text[None], output_attentions=True).attentions
        torch.testing.assert_close(got, torch.cat(expected)[..., : len(text)], atol=1e-5, rtol=1e-4)


def test_selections():
    tracer = Tracer(tiny_model("llama"))
    text = tiny_text(10)
    graph = tracer.trace(text, threshold=0.03, granularity="head")
    weights = attention_weights(tracer.decoder, text)
    generator = torch.Generator().manual_seed(0)
    for unit in ("component", "position"):
        routes = selected(graph, unit)
        drawn = [random_selection(routes, generator) for _ in range(200)]
        for one in drawn:
            for mine, theirs in zip(routes, one, strict=True):
                of_layers = (x.reshape(len(x), -1).sum(-1) for x in (mine, theirs))
                assert torch.equal(*of_layers)
        mean = torch.stack([one.heads.double() for one in drawn]).mean(0).flatten(1)
        share = routes.heads.double().flatten(1).mean(-1, keepdim=True)
        assert (mean - share).abs().max() < 0.2
        by_attention = attention_selection(weights, routes)
        assert torch.equal(by_attention.heads.flatten(1).sum(-1), routes.heads.flatten(1).sum(-1))
        assert torch.equal(by_attention.ffn, routes.ffn)
    # By hand: the head with the largest weight into the last position, in the top layer.
    one_head = selected(graph, "component")
    one_head.heads[:] = False
    one_head.heads[-1, 0] = True
    found = attention_selection(weights, one_head)
    strongest = int(weights[-1, :, -1].amax(-1).argmax())
    assert found.heads.nonzero().tolist() == [[2, strongest]]
    without = attention_selection(weights, one_head, first_token=False)
    strongest = int(weights[-1, :, -1, 1:].amax(-1).argmax())
    assert without.heads.nonzero().tolist() == [[2, strongest]]


def test_keeping_the_planted_circuit_keeps_the_prediction():
    """What is outside of the graph is the mean of texts in which nothing repeats; what is in a
    graph of that size drawn at random is not enough.
    """
    tracer = Tracer(induction_model())
    task = induction_task(4)
    values = circuits.mean_activations(tracer.decoder, induction_task(40, seed=1).twins)
    kept = survival(tracer, task, values, thresholds=(0.05,), draws=6)
    for unit in ("component", "position"):
        assert kept.beats_random(unit).all()
        assert float(kept.share(unit, "routes").mean()) > 0.5
        assert kept.logit_difference[unit, "random"].shape == (4, 1, 6)
    assert float(kept.empty[0].abs().mean()) < 0.2 * float(kept.full[0].mean())
    which = torch.arange(4)
    logits = circuits.run(tracer.decoder, task.texts)
    torch.testing.assert_close(kept.full[0], task.logit_difference(logits, which))
    torch.testing.assert_close(kept.full[1], task.probability(logits, which))
    removed = survival(tracer, task, values, mode="remove", thresholds=(0.05,), draws=6)
    assert float(removed.share("component", "routes").mean()) < 0.2
    assert removed.beats_random("component").all()


def test_survival_is_what_ablated_runs_say(tmp_path):
    tracer = Tracer(tiny_model("llama"))
    task = small_task(2)
    values = circuits.zero_activations(tracer.decoder)
    folder = tmp_path / "keep"
    kept = survival(tracer, task, values, thresholds=(0.02, 0.1), draws=2, checkpoint=folder)
    for i, text in enumerate(task.texts):
        for m, threshold in enumerate((0.02, 0.1)):
            graph = tracer.trace(text, threshold=threshold, granularity="head")
            for unit in ("component", "position"):
                heads, ffn = selected(graph, unit)
                logits = circuits.ablated_logits(
                    tracer.decoder, [text], values, ~heads[None], ~ffn[None]
                )
                expected = task.logit_difference(logits, torch.tensor([i]))
                got = kept.logit_difference[unit, "routes"][i, m : m + 1]
                torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert len(list(folder.iterdir())) == 2
    assert kept.solved.tolist() == (kept.full[0] > 0).tolist()
    for what, i in (("ld", 0), ("probability", 1)):
        routes, random = (kept.left("position", m, what) for m in ("routes", "random"))
        share = (routes - random) / kept.full[i][:, None]
        assert torch.equal(kept.beats_random("position", what), share > 0)
        # Two thresholds: the trapezoid's height is the mean of its sides.
        torch.testing.assert_close(
            kept.area("position", "routes", what), (routes / kept.full[i][:, None]).mean(1)
        )
        assert torch.equal(kept.area_beats_random("position", what), share.mean(1) > 0)
    again = survival(tracer, task, values, thresholds=(0.1, 0.02), draws=2, checkpoint=folder)
    for key, value in kept.probability.items():
        assert torch.equal(again.probability[key], value)
    with pytest.raises(FormatError, match="of another model, task or setting"):
        survival(tracer, task, values, thresholds=(0.3,), draws=2, checkpoint=folder)
    with pytest.raises(ValueError, match="thresholds: is empty"):
        survival(tracer, task, values, thresholds=())


# Input tokens


def test_deletion_groups_and_mass():
    attribution = torch.tensor([0.1, 0.5, 0.2, 0.0, 0.2])
    assert deletion_groups(attribution, range(5), 2) == [[1, 2, 4], [0, 3]]
    assert deletion_groups(attribution, [0, 3, 4]) == [[4], [0], [3]]
    left = mass_left(attribution, [[1, 2, 4], [0, 3]])
    torch.testing.assert_close(left, torch.tensor([1, 0.1, 0]).double(), atol=1e-6, rtol=0)
    nothing = mass_left(torch.zeros(4), [[0], [1, 2], [3]])
    torch.testing.assert_close(nothing, torch.tensor([1, 2 / 3, 1 / 3, 0]).double())


def test_rise_mas_and_insertion_by_hand():
    scores = torch.tensor([-1.0, -3.0, -2.0, -5.0])
    # Normalized 1, 1/2, 3/4, 0; never rising: 1, 1/2, 1/2, 0: area (1/2 + 1/2 + 1/2) / 3.
    left = torch.tensor([1, 0.5, 0.25, 0])
    # With the distance from what is left: 1, 1/2, 3/4, 0.
    rise, mas = rise_and_mas(scores, left)
    assert math.isclose(rise, 0.5)
    assert math.isclose(mas, (0.5 + 0.5 + 0.75) / 3)
    assert rise_and_mas(torch.tensor([1.0, 3.0, 1.0]), left[:3]) == (0.5, 0.5)
    # Rising: 0, 1/2, 1/2, 1.
    assert math.isclose(insertion_area(torch.tensor([-5.0, -3.0, -4.0, -1.0])), 0.5)


@pytest.mark.skipif(
    importlib.util.find_spec("flashtrace") is None, reason="expected: flashtrace is not installed"
)
def test_rise_and_mas_are_those_of_flashtrace():
    from flashtrace.improved import faithfulness_test_skip_tokens

    tokenizer = word_tokenizer()
    tracer = Tracer(word_model(tokenizer), tokenizer)
    generator = torch.Generator().manual_seed(0)
    n = 23
    ids = torch.randint(1, len(tokenizer), (n,), generator=generator)

    class Encoding:
        """Stands for a tokenizer: whatever the prompt, its tokens are `ids`."""

        eos_token = ""

        def __call__(self, text, **_):
            found = ids if text == " prompt" else ids[:1]
            return type("Encoded", (), {"input_ids": found[None]})

    class Evaluator:
        device = torch.device("cpu")
        tokenizer = Encoding()

        def _ensure_pad_token_id(self):
            return 0

        def format_prompt(self, prompt):
            return prompt

        def compute_logprob_response_given_prompt(self, prompt_ids, _):
            return circuits.run(tracer.decoder, [prompt_ids[0]]).log_softmax(-1)[:, 5]

    evaluator = Evaluator()
    for seed in range(3):
        attribution = torch.rand(n, generator=torch.Generator().manual_seed(seed))
        among = [t for t in range(n) if t % 5]
        expected = faithfulness_test_skip_tokens(
            evaluator,
            attribution[None],
            "prompt",
            "target",
            keep_prompt_token_indices=among,
            user_prompt_indices=list(range(n)),
            k=7,
        )
        groups = deletion_groups(attribution, among, 7)
        texts = [ids]
        for group in groups:
            text = texts[-1].clone()
            text[group] = 0
            texts.append(text)
        scores = circuits.run(tracer.decoder, texts).log_softmax(-1)[:, 5]
        got = rise_and_mas(scores, mass_left(attribution, groups))
        assert got == pytest.approx(expected[:2], abs=1e-5)


@pytest.mark.skipif(
    importlib.util.find_spec("flashtrace") is None, reason="expected: flashtrace is not installed"
)
def test_direct_reads_of_the_answer_are_flashtraces_importances():
    tokenizer = word_tokenizer()
    tracer = Tracer(word_model(tokenizer), tokenizer)
    task = circuits.ioi(tokenizer, 3)
    for i in range(3):
        ours = METHODS["direct reads, answer appended"](tracer, task, i)
        torch.testing.assert_close(ours, METHODS["FlashTrace"](tracer, task, i), atol=1e-5, rtol=0)
        before = METHODS["direct reads"](tracer, task, i)
        assert (ours - before).abs().max() > 1e-3


def test_direct_reads_are_sums_over_heads_and_layers():
    tracer = Tracer(tiny_model("gpt2"))
    text = tiny_text(9).tolist()
    oracle = Tracer(tracer.model, impl="reference")
    expected = torch.zeros(9)
    for scores in oracle.contributions(text, keep=0):
        for _, target, source, weight in zip(*scores.head_edges, strict=True):
            expected[source] += weight if target == 8 else 0
    torch.testing.assert_close(direct_reads(tracer, text), expected, atol=1e-5, rtol=0)


def test_the_last_token_can_be_left_in_place():
    tokenizer = word_tokenizer()
    tracer = Tracer(word_model(tokenizer), tokenizer)
    task = circuits.ioi(tokenizer, 1)
    text = task.texts[0]
    last_first = torch.arange(len(text)).float()
    others = last_first.clone()
    others[-1] = -1
    same = _curves(tracer, task, 0, {"a": last_first, "b": others}, 20, True)
    # The same texts are run, in other rows of a batch.
    expected = pytest.approx((same["b"].rise, same["b"].insertion), rel=1e-5)
    assert (same["a"].rise, same["a"].insertion) == expected
    apart = _curves(tracer, task, 0, {"a": last_first, "b": others}, 20, False)
    assert apart["a"].rise != apart["b"].rise


def test_attributions():
    tokenizer = word_tokenizer()
    tracer = Tracer(word_model(tokenizer), tokenizer)
    task = circuits.ioi(tokenizer, 2)
    for name, method in METHODS.items():
        if name == "FlashTrace" and importlib.util.find_spec("flashtrace") is None:
            continue
        got = method(tracer, task, 1)
        assert got.shape == (len(task.texts[1]),)
        assert (got >= 0).all()
        assert got.sum() > 0
    # Rollout against the product of matrices, gradient x input against autograd.
    weights = attention_weights(tracer.decoder, task.texts[0]).double().mean(1)
    product = torch.eye(weights.shape[-1], dtype=torch.float64)
    for of_layer in weights:
        product = (of_layer + torch.eye(len(of_layer))) / 2 @ product
    torch.testing.assert_close(METHODS["attention rollout"](tracer, task, 0), product[-1].float())
    model, prompt = tracer.model, task.prompts[0]
    embedded = model.get_input_embeddings()(torch.tensor([prompt.token_ids])).detach()
    embedded.requires_grad_()
    log = model(inputs_embeds=embedded).logits[0, -1].log_softmax(-1)[prompt.right[0]]
    (gradient,) = torch.autograd.grad(log, embedded)
    expected = (gradient * embedded).sum(-1)[0].abs().detach()
    torch.testing.assert_close(
        METHODS["gradient x input"](tracer, task, 0), expected, atol=1e-5, rtol=1e-4
    )
    with pytest.raises(ValueError, match="methods: expected some of"):
        circuits.token_faithfulness(tracer, task, ["guessing"])


# The command


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tokenizer = word_tokenizer()
    folder = tmp_path / "model"
    word_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("task", ["ioi", "greater-than"])
def test_the_command_writes_its_report(task, saved, tmp_path):
    out = tmp_path / "out"
    arguments = ["circuits", "--task", task, "--model", str(saved), "--out", str(out), "-n", "4",
                 "--draws", "2", "--cost-prompts", "1", "--input-prompts", "2",
                 "--patch-prompts", "3"]  # fmt: skip
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    report = (out / "report.md").read_text()
    for said in ("## Cost", "## Agreement", "## Keep-only", "## Remove-only", "## Input tokens"):
        assert said in report
    for picture in ("roc.png", "heads.png", "keep.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    document = json.loads((out / "results.json").read_text(), parse_constant=pytest.fail)
    assert max(document["exact"].values()) <= 1e-5
    if task == "ioi":  # in the other, every head has an effect or none has
        assert "Heads with an effect that they rank lowest" in report
    assert "The model solves" in report
    assert "over thresholds" in report
    cost = {(row["what"], row["prompts"]): row for row in document["cost"]}
    assert cost["routes", 4]["runs"] == 4
    each = cost["patching, heads at each position", 1]
    n_tokens = {len(p["text"].split()) for p in document["prompts"]}
    assert each["runs"] > cost["patching, heads", 1]["runs"] == 6
    assert each["runs"] <= 6 * (max(n_tokens) + 4)
    with (out / "heads.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    tokenizer = word_tokenizer()
    tracer = Tracer(word_model(tokenizer), tokenizer)
    made = circuits.tasks.TASKS[task](tokenizer, 4)
    made = Task(made.name, made.seed, made.prompts[:3])
    effects = patch(tracer.decoder, made)
    routes = contrastive(tracer, made, threshold=0.01)
    for row in rows:
        at = int(row["layer"]), int(row["head"])
        expected = float(effects.heads.mean(0)[at]) / effects.gap
        assert float(row["denoise"]) == pytest.approx(expected, abs=1e-3, rel=1e-3)
        expected = float(routes.heads.mean(0)[at])
        assert float(row["contrastive routes"]) == pytest.approx(expected, abs=1e-5)
    # What is there already is not computed again: the same seconds.
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads((out / "results.json").read_text())["cost"] == document["cost"]


def test_the_command_refuses_what_it_does_not_know(tmp_path):
    result = CliRunner().invoke(app, ["circuits", "--task", "chess", "--out", str(tmp_path)])
    assert isinstance(result.exception, ValueError)
    assert "--task: expected one of ioi, greater-than, got 'chess'" in str(result.exception)
    with pytest.raises(ValueError, match="draws: expected at least 1, got 0"):
        Settings(draws=0).check()

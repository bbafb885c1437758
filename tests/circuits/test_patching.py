"""Patching and ablation against whole runs, one for each patch; a planted circuit is found."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from circuit_tasks import small_task
from opened import tiny_tracer
from planted_circuit import CIRCUIT, induction_model, induction_task
from torch import Tensor

from ifr_fast import Tracer, circuits
from ifr_fast.circuits import Task, components, contrastive, patch
from ifr_fast.circuits.checkpoint import FORMAT
from ifr_fast.errors import FormatError
from ifr_fast.storage.tensors import load_tensors


def swept(tracer: Tracer, task: Task, direction: str, each: bool) -> tuple[Tensor, Tensor]:
    """Effects by one whole run of the model for each patch: no batches, no restarts."""
    decoder = tracer.decoder
    L, H = decoder.n_layers, decoder.n_heads
    T = max(map(len, task.texts)) if each else 1
    heads, ffn = torch.zeros(len(task), L, H, T), torch.zeros(len(task), L, T)
    for i, prompt in enumerate(task.prompts):
        texts = (prompt.twin_ids, prompt.token_ids)
        base, source = texts if direction == "denoise" else texts[::-1]
        taken, which = circuits.observe(decoder, [source]), torch.tensor([i])
        ids = torch.tensor([base])
        patched = {"layer": -1, "head": H, "span": slice(None)}  # head H is the FFN block

        def edit(at: int, z: Tensor, taken=taken, patched=patched) -> Tensor:
            head, span = patched["head"], patched["span"]
            if patched["layer"] == at and head < H:
                z = z.clone()
                z[:, span, head] = taken.z[at][:, span, head]
            return z

        def edit_ffn(at: int, x: Tensor, taken=taken, patched=patched) -> Tensor:
            if (patched["layer"], patched["head"]) == (at, H):
                x = x.clone()
                x[:, patched["span"]] = taken.ffn[at][:, patched["span"]]
            return x

        def measured(ids=ids, which=which) -> float:
            logits = tracer.model(input_ids=ids, use_cache=False).logits[:, -1]
            return float(task.logit_difference(logits, which))

        spans = [slice(t, t + 1) for t in range(len(base))] if each else [slice(None)]
        with torch.no_grad(), circuits.intervening(decoder, heads=edit, ffn=edit_ffn):
            before = measured()
            for (t, span), layer, head in itertools.product(
                enumerate(spans), range(L), range(H + 1)
            ):
                patched.update(layer=layer, head=head, span=span)
                effect = (measured() - before) * (1 if direction == "denoise" else -1)
                if head < H:
                    heads[i, layer, head, t] = effect
                else:
                    ffn[i, layer, t] = effect
    return (heads, ffn) if each else (heads[..., 0], ffn[..., 0])


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("positions", ["all", "each"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gptj"])
def test_sweeps_are_those_of_whole_runs_one_by_one(family, positions, direction):
    tracer = tiny_tracer(family, torch.float64)
    task = small_task(1 if family == "gptj" else 2, shortest=5)
    paired = direction == "denoise"
    got = patch(tracer.decoder, task, direction=direction, positions=positions, paired=paired)
    heads, ffn = swept(tracer, task, direction, positions == "each")
    assert heads.abs().max() > 0.01
    torch.testing.assert_close(got.heads.float(), heads, atol=1e-5, rtol=0)
    torch.testing.assert_close(got.ffn.float(), ffn, atol=1e-5, rtol=0)
    if positions == "each":
        torch.testing.assert_close(got.summed().heads.float(), heads.sum(-1), atol=1e-4, rtol=0)


def test_patching_a_text_with_its_own_activations_has_no_effect():
    """In float32, at every position and in batches of every size. Corrupted prompts that do not
    differ have no effect; those that do differ have none with their own activations.
    """
    decoder, task = tiny_tracer("llama").decoder, small_task()
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
    """Runs restarted at any position, in batches of any size, have the model's own logits."""
    decoder = smol.decoder
    for text in make(smol.tokenizer, 2, seed=0).texts:
        seen, T = circuits.observe(decoder, [text]), len(text)
        plain = smol.model(input_ids=torch.tensor([text])).logits[:, -1]
        with circuits.restarting(decoder):
            for layer, t, n in itertools.product((0, 15), (0, T // 2, T - 3, T - 1), (1, 4)):
                of = torch.zeros(n, dtype=torch.int64)
                z = seen.z[layer][of, t : t + 1]
                got = seen.restart(layer, of, t, t + 1, z=z)
                # Rounding, which differs from processor to processor.
                assert (got - plain).abs().max() <= 3e-6 * plain.abs().max()


def test_ablation_sweeps():
    """Effects of ablation equal those of whole runs with masks."""
    tracer = tiny_tracer("llama", torch.float64)
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
    decoder, task = tiny_tracer("gpt2", torch.float64).decoder, small_task()
    effects = patch(decoder, task, positions="each")
    for i, text in enumerate(task.texts):
        last = effects.heads[i, -1]
        assert (last[:, : len(text) - 1] == 0).all()
        assert (last[:, len(text) - 1] != 0).any()
        assert (effects.heads[i, :, :, : task.prompts[i].first_difference] == 0).all()
        assert (effects.heads[i, :, :, len(text) :] == 0).all()


def test_an_interrupted_sweep_goes_on(tmp_path, monkeypatch):
    decoder, task = tiny_tracer("llama").decoder, small_task()
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
    kept = [load_tensors(x, FORMAT)[1]["seconds"] for x in tmp_path.iterdir()]
    assert again.seconds > sum(kept) > 0
    with pytest.raises(FormatError, match="another model, task or kind"):
        patch(decoder, task, direction="noise", checkpoint=tmp_path)


def test_arguments_of_patch():
    decoder, task = tiny_tracer("llama").decoder, small_task()
    for wrong in ({"direction": "up"}, {"positions": "some"}, {"layers": [7]}, {"layers": []}):
        (name,) = wrong
        with pytest.raises(ValueError, match=f"{name}: expected"):
            patch(decoder, task, **wrong)
    with pytest.raises(ValueError, match="of all positions at once"):
        patch(decoder, task, layers=[0]).summed()


def top(scores: Tensor, k: int = 2) -> set[tuple[int, int]]:
    H = scores.shape[1]
    return {divmod(i, H) for i in scores.flatten().topk(k).indices.tolist()}


def test_patching_and_contrastive_routes_name_the_planted_heads():
    """Plain routes do not name them, since a head that is always active has more weight."""
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

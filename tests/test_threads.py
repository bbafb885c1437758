"""Threads that share a model: every result is the single thread's, bit for bit."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from same_graph import assert_same_bits
from tiny import tiny_model, tiny_text
from transformers import PreTrainedModel

from ifr_fast import RouteGraph, Tracer

N_THREADS = 4
RUNS = 25
TEXTS = [tiny_text(9 + i, seed=i) for i in range(N_THREADS)]

Job = Callable[[Tracer, int], list[RouteGraph]]


def traced(tracer: Tracer, i: int) -> list[RouteGraph]:
    return [tracer.trace(TEXTS[i], threshold=0.02)]


def of_every_position(tracer: Tracer, i: int) -> list[RouteGraph]:
    return list(tracer.trace_all(TEXTS[i], threshold=0.02))


def in_a_batch(tracer: Tracer, i: int) -> list[RouteGraph]:
    return tracer.trace([TEXTS[i], TEXTS[i][:-2]], threshold=0.02)


def replayed(tracer: Tracer, i: int) -> list[RouteGraph]:
    return [tracer.trace(tracer.record(TEXTS[i], mode="lean"), position=-2, threshold=0.02)]


def generated(tracer: Tracer, i: int) -> list[RouteGraph]:
    options = {"max_new_tokens": 3, "threshold": 0.02, "eos_token_id": []}
    return [step.graph for step in tracer.generate(TEXTS[i][:5], **options)]


def opened(tracer: Tracer, i: int) -> list[RouteGraph]:
    return [Tracer(tracer.model, impl=tracer.impl).trace(TEXTS[i], threshold=0.02)]


JOBS: dict[str, Job] = {
    "trace": traced,
    "trace_all": of_every_position,
    "batch": in_a_batch,
    "lean": replayed,
    "generate": generated,
    "open": opened,
}


@pytest.fixture(autouse=True)
def quick_switches() -> Iterator[None]:
    """Threads are switched between after a few instructions."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def in_threads(work: Callable[[int], Any]) -> list[Any]:
    """The results of `work` in threads that start together."""
    barrier = threading.Barrier(N_THREADS)

    def begin(i: int) -> Any:
        barrier.wait()
        return work(i)

    with ThreadPoolExecutor(N_THREADS) as pool:
        return list(pool.map(begin, range(N_THREADS)))


def assert_alike(got: list[RouteGraph], expected: list[RouteGraph]) -> None:
    for mine, theirs in zip(got, expected, strict=True):
        assert_same_bits(mine, theirs)


@pytest.mark.parametrize(
    ("name", "family", "impl"),
    [
        ("trace", "llama", "cpu"),
        ("trace", "gpt_neox", "eager"),
        ("trace", "gpt_neo", "cpu"),  # its attention is its own
        ("lean", "llama", "cpu"),
        ("lean", "gpt2", "eager"),
    ],
)
def test_threads_that_trace(name: str, family: str, impl: str) -> None:
    tracer = Tracer(tiny_model(family), impl=impl)
    job = JOBS[name]
    expected = [job(tracer, i) for i in range(N_THREADS)]

    def work(i: int) -> list[list[RouteGraph]]:
        return [job(tracer, i) for _ in range(RUNS)]

    for i, results in enumerate(in_threads(work)):
        for got in results:
            assert_alike(got, expected[i])


@pytest.mark.parametrize("family", ["llama", "qwen3_next"])
def test_threads_that_do_everything_at_once(family: str) -> None:
    tracer = Tracer(tiny_model(family))
    jobs = list(JOBS.values())
    expected = [[job(tracer, i) for job in jobs] for i in range(N_THREADS)]
    before = tracer.model.config._attn_implementation

    def work(i: int) -> list[list[list[RouteGraph]]]:
        order = [*range(i, len(jobs)), *range(i)]  # every thread is at another job
        found: list[Any] = [None] * len(jobs)
        results = []
        for _ in range(3):
            for at in order:
                found[at] = jobs[at](tracer, i)
            results.append(list(found))
        return results

    for i, results in enumerate(in_threads(work)):
        for found in results:
            for got, theirs in zip(found, expected[i], strict=True):
                assert_alike(got, theirs)
    assert tracer.model.config._attn_implementation == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tracer.model.modules())


@pytest.mark.parametrize(
    ("family", "training", "implementation"),
    [("llama", False, "sdpa"), ("llama", True, "eager"), ("gpt_neox", True, "sdpa")],
)
def test_a_forward_pass_of_the_user_meanwhile(
    family: str, training: bool, implementation: str
) -> None:
    model = tiny_model(family)
    model.set_attn_implementation(implementation)
    model.train(training)  # without dropout, so that logits are those of eval mode
    tracer = Tracer(model)
    expected = traced(tracer, 0)
    with torch.no_grad():
        logits = [model(text[None]).logits for text in TEXTS]
    done = threading.Event()
    wrong: list[BaseException] = []

    def run_the_model() -> None:
        try:
            i = 0
            while not done.is_set():
                with torch.no_grad():
                    got = model(TEXTS[i % N_THREADS][None]).logits
                assert torch.equal(got, logits[i % N_THREADS])
                i += 1
        except BaseException as error:
            wrong.append(error)

    users = [threading.Thread(target=run_the_model) for _ in range(2)]
    for user in users:
        user.start()
    try:
        for _ in range(RUNS // 3):
            assert_alike(traced(tracer, 0), expected)
            generated(tracer, 1)
            opened(tracer, 2)
    finally:
        done.set()
        for user in users:
            user.join()
    assert not wrong
    assert all(module.training == training for module in model.modules())


def test_a_pass_that_had_begun_goes_on_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's pass is held up within its second layer while another thread traces."""
    model = tiny_model("llama")
    tracer = Tracer(model)
    expected = traced(tracer, 0)
    with torch.no_grad():
        logits = model(TEXTS[1][None]).logits
    inside, resume = threading.Event(), threading.Event()
    users: list[int] = []

    def hold(*_: Any) -> None:
        if threading.get_ident() in users:
            inside.set()
            resume.wait(30)

    def run_the_model() -> torch.Tensor:
        users.append(threading.get_ident())
        with torch.no_grad():
            return model(TEXTS[1][None]).logits

    handle = model.model.layers[1].register_forward_pre_hook(hold)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run_the_model)
        assert inside.wait(30)
        with tracer.decoder.replaying():  # the model is held, its attention replaced
            resume.set()
            got = running.result(30)
        assert_alike(traced(tracer, 0), expected)
    handle.remove()
    assert torch.equal(got, logits)


def test_a_wrapped_model(peft_model: PreTrainedModel) -> None:
    """PEFT calls the model that it wraps without its hooks."""
    tracer = Tracer(peft_model)
    expected = traced(tracer, 0)
    with torch.no_grad():
        logits = peft_model(TEXTS[1][None]).logits
    assert torch.isfinite(logits).all()

    def work(i: int) -> Any:
        if i % 2:
            with torch.no_grad():
                return [peft_model(TEXTS[1][None]).logits for _ in range(RUNS)]
        return [traced(tracer, 0) for _ in range(RUNS)]

    for i, results in enumerate(in_threads(work)):
        for got in results:
            if i % 2:
                assert torch.equal(got, logits)
            else:
                assert_alike(got, expected)


@pytest.fixture
def peft_model() -> PreTrainedModel:
    import peft

    config = peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    return peft.get_peft_model(tiny_model("llama"), config).eval()

"""Replacement of an installed llm_transparency_tool."""

from __future__ import annotations

import importlib
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from paths import DOCS
from tiny import tiny_model, tiny_text
from transparency_cases import largest_gap, ran

from ifr_fast import IfrError
from ifr_fast.compat import llm_transparency_tool as tool
from ifr_fast.compat.llm_transparency_tool import build_full_graph

STAND_IN = {
    "__init__": "",
    "routes/__init__": "",
    "models/__init__": "",
    "server/__init__": "",
    "routes/contributions": "\n".join(
        f"def {name}(*args, **kwargs): raise AssertionError"
        for name in (
            "get_contributions",
            "get_contributions_with_one_off_part",
            "get_attention_contributions",
            "get_mlp_contributions",
            "get_decomposed_mlp_contributions",
            "apply_threshold_and_renormalize",
        )
    ),
    "routes/graph": (
        "def build_full_graph(*args): raise AssertionError\n"
        "def build_paths_to_predictions(*args): raise AssertionError"
    ),
    "models/transparent_llm": "from abc import ABC\nclass TransparentLlm(ABC): pass",
    "models/tlens_model": (
        "from llm_transparency_tool.models.transparent_llm import TransparentLlm\n"
        "class TransformerLensTransparentLlm(TransparentLlm): pass"
    ),
    "server/app": (
        "from llm_transparency_tool.models.tlens_model import TransformerLensTransparentLlm\n"
        "import llm_transparency_tool.routes.contributions as contributions\n"
        "import llm_transparency_tool.routes.graph"
    ),
    "server/utils": "from llm_transparency_tool.routes.graph import build_full_graph",
}


@pytest.fixture
def lay_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Puts a package with the published one's module names on the path, some of them changed."""

    def write(**changed: str) -> None:
        for name, source in {**STAND_IN, **changed}.items():
            path = tmp_path / "llm_transparency_tool" / f"{name}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)
        monkeypatch.syspath_prepend(tmp_path)

    yield write
    for name in list(sys.modules):
        if name.startswith("llm_transparency_tool"):
            del sys.modules[name]


@pytest.mark.parametrize("parity", [False, True])
def test_install(parity: bool, lay_out: Callable[..., None]) -> None:
    """Some of the package's modules are loaded before, some after."""
    lay_out()
    app = importlib.import_module("llm_transparency_tool.server.app")
    theirs = app.TransformerLensTransparentLlm
    restore = tool.install(parity=parity)
    try:
        utils = importlib.import_module("llm_transparency_tool.server.utils")
        made = tiny_model("qwen2").eval()
        of = app.TransformerLensTransparentLlm("a name", made, None, "cpu", torch.float32)
        base = sys.modules["llm_transparency_tool.models.transparent_llm"].TransparentLlm
        assert isinstance(of, base)
        assert of.parity is parity
        assert of.model_info().name == "a name"
        # As the app's own `load_model` and `run_inference` do.
        of = app.TransformerLensTransparentLlm(
            model_name="a name",
            hf_model=made,
            tokenizer=None,
            device="cpu",
            dtype=torch.float32,
            supported_model_name="another",
        )
        with torch.inference_mode():
            of = of.copy()
            of.run([tiny_text(12)])
        expected = ran("qwen2", 12, parity)
        graph = utils.build_full_graph(of, 0, 0.04)
        assert largest_gap(graph, build_full_graph(expected, 0, 0.04)) == 0
        arguments = torch.ones(2, 3), torch.ones(3)
        assert torch.equal(
            app.contributions.get_contributions(*arguments),
            tool.get_contributions(*arguments, parity=parity),
        )
        assert app.contributions.get_contributions.keywords == {"parity": parity}
    finally:
        restore()
    assert app.TransformerLensTransparentLlm is theirs


def test_the_app_starts_as_the_page_says(
    lay_out: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    """As Streamlit does, the script is run again and again in one process."""
    lay_out(
        **{
            "server/app": (
                "from llm_transparency_tool.models import tlens_model\n"
                "from llm_transparency_tool.server.utils import build_full_graph\n"
                "if __name__ == '__main__':\n"
                "    model = tlens_model.TransformerLensTransparentLlm\n"
                "    print(model.parity, build_full_graph.__module__)"
            )
        }
    )
    page = (DOCS / "compat-llm-transparency-tool.md").read_text()
    script = textwrap.dedent(
        page.split("Keep this as `start.py`:")[1].split("and start the app")[0]
    )
    for _ in range(3):
        exec(compile(script, "start.py", "exec"), {"__name__": "__main__"})
    expected = "False ifr_fast.compat.llm_transparency_tool.graph"
    assert capsys.readouterr().out.splitlines() == [expected] * 3


def test_install_without_the_tool() -> None:
    with pytest.raises(IfrError, match="install needs llm_transparency_tool, which is not install"):
        tool.install()


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("eval('a b')", "SyntaxError: invalid syntax"),  # as typeguard 4 reads annotations
        ("import a_package_that_is_not_there", "ModuleNotFoundError: No module named 'a_package"),
        ("raise TypeError('of another version')", "TypeError: of another version"),
        ("raise AssertionError", "AssertionError"),
    ],
)
def test_a_tool_that_cannot_be_imported(
    source: str, said: str, lay_out: Callable[..., None]
) -> None:
    lay_out(**{"models/tlens_model": source})
    with pytest.raises(IfrError) as caught:
        tool.install()
    message = str(caught.value)
    assert f"install needs llm_transparency_tool, which cannot be imported ({said}" in message
    assert "typeguard 2.13.3" in message
    assert caught.value.__cause__ is not None


def test_a_tool_that_lacks_a_function(lay_out: Callable[..., None]) -> None:
    lay_out(**{"routes/graph": "def build_full_graph(*args): raise AssertionError"})
    missing = r"this llm_transparency_tool has no routes.graph.build_paths_to_predictions: expected"
    with pytest.raises(IfrError, match=missing):
        tool.install()

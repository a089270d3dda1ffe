"""Bundles opened in JavaScript, in node and in a browser, through the examples that show how."""

from __future__ import annotations

import functools
import html
import http.server
import re
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
from model_helpers import tiny_config
from run_helpers import recipe_of

from koff_export.runtime import Runtime

EXAMPLES = Path(__file__).parents[1] / "examples" / "javascript"
MODULES = Path(__file__).parent / "javascript" / "node_modules"
MEMORIES = (None, "law", "code")
PROMPT = [5, 9, 30, 77]

if not shutil.which("node") or not MODULES.is_dir():
    pytest.skip("node or its modules are missing: run tests/install-javascript.sh", allow_module_level=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the examples, onnxruntime and a bundle, as a server would offer it."""
    import koff_prune as package

    folder = tmp_path_factory.mktemp("site")
    recipe = recipe_of(
        folder,
        tiny_config("qwen2", num_hidden_layers=2, intermediate_size=128),
        learn={"rates": {"lora": 0.05, "kv": 0.2}},  # so that memories say something
        export={
            "formats": ["safetensors", "onnx"],
            "onnx": {"precision": ["fp32", "int8"], "javascript": True},
        },
    )
    package.export(recipe, folder / "run")
    package.export(recipe, folder / "run", resume=True, merge="law")
    for file in EXAMPLES.iterdir():
        shutil.copy(file, folder)
    (folder / "bundle").symlink_to(folder / "run" / "bundle")
    (folder / "node_modules").symlink_to(MODULES)
    (folder / "ort").symlink_to(MODULES / "onnxruntime-web" / "dist")
    return folder


@pytest.fixture(scope="module")
def merged(site: Path) -> Path:
    """The examples with a bundle that has law's memory baked in, and no slots."""
    folder = site.with_name("merged")
    folder.mkdir()
    for place in site.iterdir():
        if place.name != "bundle":
            (folder / place.name).symlink_to(place)
    (folder / "bundle").symlink_to(site / "run" / "bundle-law")
    return folder


@pytest.fixture(scope="module")
def expected(site: Path) -> dict[str | None, list[int]]:
    runtime = Runtime.open(site / "bundle")
    found = {memory: list(runtime.generate_tokens(PROMPT, memory, 24)) for memory in MEMORIES}
    assert len({tuple(answer) for answer in found.values()}) > 1
    return found


@pytest.mark.parametrize("memory", MEMORIES)
def test_node_says_the_same_tokens(
    memory: str | None, site: Path, expected: dict[str | None, list[int]]
) -> None:
    command = ["node", "node.mjs", "bundle", memory or "none", ",".join(map(str, PROMPT))]
    done = subprocess.run(command, cwd=site, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert [int(token) for token in done.stdout.split()] == expected[memory]
    for precision in ("int8", "int8_dynamic"):
        few_bits = subprocess.run(
            [*command, precision], cwd=site, capture_output=True, text=True, timeout=60, check=False
        )
        ours = list(Runtime.open(site / "bundle", precision).generate_tokens(PROMPT, memory, 24))
        assert [int(token) for token in few_bits.stdout.split()] == ours, few_bits.stderr


def test_node_runs_a_merged_bundle(merged: Path, expected: dict[str | None, list[int]]) -> None:
    command = ["node", "node.mjs", "bundle", "none", ",".join(map(str, PROMPT))]
    done = subprocess.run(command, cwd=merged, capture_output=True, text=True, timeout=60, check=False)
    assert [int(token) for token in done.stdout.split()] == expected["law"], done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("bundle", "constructor", "5,9"), "no memory constructor; it has "),
        (("bundle", "law", ""), "usage: node node.mjs BUNDLE"),
        (("bundle", "law", "5,x"), "usage: node node.mjs BUNDLE"),
        (("bundle", "law", "5,999999"), "tokens: the model knows those below"),
        (("bundle", "law", "5", "toString"), "no JavaScript graph in toString"),
        (("nowhere", "law", "5"), "nowhere"),
    ],
)
def test_node_tells_a_mistake(site: Path, arguments: tuple[str, ...], says: str) -> None:
    command = ["node", "node.mjs", *arguments]
    done = subprocess.run(command, cwd=site, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: ") and says in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.timeout(240)
@pytest.mark.parametrize("bundle", ["site", "merged"])
def test_a_browser_says_the_same_tokens(
    bundle: str, site: Path, merged: Path, expected: dict[str | None, list[int]]
) -> None:
    if bundle == "merged":  # whose bare graph says what law's memory does
        site, expected = merged, {None: expected["law"]}
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("chromium is missing: run tests/install-chromium.sh")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for memory in expected:
            page = (
                f"http://127.0.0.1:{server.server_port}/index.html?memory={memory or 'none'}&tokens=5,9,30,77"
            )
            done = subprocess.run(
                [browser, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=60000",
                 "--dump-dom", page],
                capture_output=True, text=True, timeout=120, check=False,
            )  # fmt: skip
            told = re.search(r'<p id="answer">([^<]*)</p>', done.stdout)
            assert told is not None, done.stderr[-500:]
            assert html.unescape(told[1]) == f"tokens: {' '.join(map(str, expected[memory]))}"
        server.shutdown()

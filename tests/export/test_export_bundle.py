"""Damaged and hostile bundles, the manifest, and a package that needs no torch."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from export_helpers import Exported, random_kv, random_lora
from hub_helpers import hub_snapshot

from koff_export.bundle import check_files, open_manifest, write_manifest
from koff_export.errors import KoffError
from koff_export.runtime import Runtime
from koff_export.text import ChatTemplate, until_stop

EXPORT = str(Path(__file__).parents[2] / "export")


def edit(folder: Path, **changes: object) -> None:
    manifest = json.loads((folder / "koff.json").read_text())
    for key, value in changes.items():
        target, *path = [manifest, *key.split("__")]
        for part in path[:-1]:
            target = target[part]
        target[path[-1]] = value
    (folder / "koff.json").write_text(json.dumps(manifest))


def test_a_good_bundle_passes_and_unknown_keys_are_ignored(exported: Exported) -> None:
    manifest = open_manifest(exported.folder)
    check_files(exported.folder, manifest)
    assert manifest.domains["law"].kv_tokens == 7 and manifest.graph and manifest.graph.kv_heads == [2, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "update this program"),
        ({"format": "1"}, "'format'"),
        ({"window": -1}, "'window'"),
        ({"eos": ["2"]}, "'eos'"),
        ({"domains": []}, "'domains'"),
        ({"domains": {"../x": {}}}, "no name for a domain"),
        ({"graph__kv_heads": [2]}, "'kv_heads'"),
        ({"graph__layers": 10**30}, "'layers'"),
        ({"files": {"a": {"size": 1}}}, "'sha256'"),
    ],
)
def test_wrong_manifests_are_refused(copy: Path, changes: dict[str, object], message: str) -> None:
    edit(copy, **changes)
    with pytest.raises(KoffError, match=message):
        open_manifest(copy)


def test_no_bundle_and_no_json(tmp_path: Path, copy: Path) -> None:
    with pytest.raises(KoffError, match="not a bundle"):
        open_manifest(tmp_path / "nowhere")
    (copy / "koff.json").write_text("{")
    with pytest.raises(KoffError, match="not valid JSON"):
        open_manifest(copy)


def test_damaged_files_are_refused(copy: Path) -> None:
    data = copy / "onnx/model.onnx.data"
    good = data.read_bytes()
    for content, message in ((good[:-1], "truncated"), (b"\x01" + good[1:], "another sha256")):
        data.write_bytes(content)
        with pytest.raises(KoffError, match=message):
            Runtime.open(copy)
        with pytest.raises(KoffError, match=r"bytes instead of|another sha256"):
            check_files(copy, open_manifest(copy))
    data.unlink()
    with pytest.raises(KoffError, match="missing"):
        Runtime.open(copy)


def test_paths_out_of_the_bundle_are_refused(copy: Path, tmp_path: Path) -> None:
    files = json.loads((copy / "koff.json").read_text())["files"]
    (tmp_path / "outside.json").write_text("{}")
    for name in ("../outside.json", str(tmp_path / "outside.json")):
        edit(copy, files={**files, name: {"sha256": "0", "size": 2}})
        with pytest.raises(KoffError, match="leads out of"):
            check_files(copy, open_manifest(copy))
    edit(copy, files=files)
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer.json").symlink_to(tmp_path / "outside.json")
    with pytest.raises(KoffError, match="leads out of"):
        check_files(copy, open_manifest(copy))


def test_files_that_could_run_code_are_refused_anywhere(copy: Path) -> None:
    for name in ("pytorch_model.bin", "memories/law/adapter_model.pt", "modeling.py", "onnx/memories/lib.so"):
        path = copy / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
        with pytest.raises(KoffError, match="could run code"):
            check_files(copy, open_manifest(copy))
        path.unlink()
    (copy / "added_tokens.json").write_text("{}")
    with pytest.raises(KoffError, match="does not list"):
        check_files(copy, open_manifest(copy))


def test_shapes_that_lie_are_refused(copy: Path) -> None:
    edit(copy, graph__head_dim=8)
    with pytest.raises(KoffError, match="not as koff"):
        Runtime.open(copy)


def test_a_memory_can_be_dropped_in_and_a_foreign_one_is_refused(exported: Exported, copy: Path) -> None:
    from koff_export.onnx import write_adapter

    runtime = Runtime.open(copy, threads=1)
    lora, kv = random_lora(exported.model, 2, 9), random_kv(exported.model, 3, 9)
    write_adapter(copy / "onnx/memories/late.onnx_adapter", lora, kv)
    assert runtime.memories == ["law", "math", "music", "late"]
    assert list(runtime.generate_tokens([1, 5], "late", 3))
    a, b, scale = lora["model.layers.0.mlp.up_proj"]
    foreign = {
        "wide": ({"model.layers.0.mlp.up_proj": (a, b[:-1], scale)}, None),
        "alien": ({"model.layers.7.mlp.up_proj": (a, b, scale)}, None),
        "torn": ({"model.layers.0.mlp.up_proj": (a[:1], b, scale)}, None),
        "short": ({}, [kv[0], tuple(t[:, :1] for t in kv[1])]),
    }
    for name, memory in foreign.items():
        write_adapter(copy / f"onnx/memories/{name}.onnx_adapter", *memory)  # type: ignore[arg-type]
        with pytest.raises(KoffError, match="belongs to another backbone"):
            runtime.memory(name)
    write_adapter(copy / "onnx/memories/half.onnx_adapter", {}, kv[:1])
    with pytest.raises(KoffError, match="incomplete"):
        runtime.memory("half")
    (copy / "onnx/memories/junk.onnx_adapter").write_bytes(b"\x80\x04junk" * 50)
    with pytest.raises(KoffError, match="cannot read the memory"):
        runtime.memory("junk")
    (copy / "onnx/memories/law.onnx_adapter").write_bytes(
        (copy / "onnx/memories/late.onnx_adapter").read_bytes()
    )
    with pytest.raises(KoffError, match="fetch it again"):
        runtime.memory("law")


@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
def test_half_of_a_lora_is_no_memory(half: str, copy: Path) -> None:
    """The other half's slot has a default of no size, which a matrix of some rank cannot be multiplied by."""
    import onnxruntime as ort

    whole = ort.AdapterFormat.read_adapter(str(copy / "onnx/memories/law.onnx_adapter"))
    tensors = whole.get_parameters()
    torn = ort.AdapterFormat()
    torn.set_adapter_version(1)
    torn.set_model_version(1)
    gone = f"model.layers.0.mlp.up_proj.{half}.weight"
    assert gone in tensors
    torn.set_parameters({name: value for name, value in tensors.items() if name != gone})
    torn.export_adapter(str(copy / "onnx/memories/torn.onnx_adapter"))
    with pytest.raises(KoffError, match="'torn' is incomplete: fetch it again"):
        Runtime.open(copy, threads=1).memory("torn")


def test_a_chat_template_cannot_reach_python(copy: Path) -> None:
    config = json.loads((copy / "tokenizer_config.json").read_text())
    for source in (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10**9) %}{% endfor %}",
    ):
        (copy / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": source}))
        write_manifest(copy, json.loads((copy / "koff.json").read_text()))
        template = Runtime.open(copy, threads=1).chat_template()
        with pytest.raises(KoffError, match="template failed"):
            template.render([{"role": "user", "content": "x"}])


@pytest.mark.parametrize("source", [
    "{% for x in messages %}" * 30 + "{% endfor %}" * 30,  # more blocks than Python nests
    "{{ " + "(" * 3000 + ")" * 3000 + " }}",
    "{{ " + "9" * 5000 + " }}",
    '{% set x = "a" * 1500000000 %}',
    "{{ 9 ** 9 ** 9 }}",
    '{{ "%9999999999d" % 1 }}',
    '{{ "%*d" % (9999999999, 1) }}',
    '{{ "{:9999999999}".format("") }}',
    '{{ "{:{}}".format("", 9999999999) }}',
    '{{ "%9999999999d"|format(1) }}',
    '{{ ""|center(9999999999) }}',
    '{{ "a"|indent(width=9999999999, first=true) }}',
    '{{ messages[0].content.ljust(9999999999) }}',
])  # fmt: skip
def test_a_chat_template_that_breaks_the_compiler_is_one_sentence(source: str) -> None:
    with pytest.raises(KoffError, match="chat template"):
        ChatTemplate(source, {}).render([{"role": "user", "content": "x"}])


@pytest.mark.parametrize("source", [
    "{% if documents is not none %}DOCS{% endif %}{{ messages[0].content }}",
    "{% if tools is not none %}{{ tools|tojson }}{% endif %}{{ messages[0].content }}",
    "{{ messages[0]|tojson(ensure_ascii=True, sort_keys=True, separators=(',', ':')) }}",
    "{{ '%s has %05.1f%%' % ('x', 3) }}{{ '{:>9}|{}'.format('x', 20260101) }}{{ 'a'.ljust(7) }}|{{ 7 % 4 }}",
    "{{ '%s'|format(20260101) }}{{ 'a'|center(9) }}{{ 'a\nb'|indent(2) }}{{ messages[0].content|indent }}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
])  # fmt: skip
def test_a_chat_template_is_read_as_transformers_reads_it(source: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [{"role": "user", "content": "né <b>"}]
    (wanted,), _ = render_jinja_template([messages], chat_template=source, add_generation_prompt=True)
    assert ChatTemplate(source, {}).render(messages) == wanted


@pytest.mark.parametrize(
    ("pieces", "stop", "kept"),
    [(["xab", "c"], ["abc", "b"], "x"), (["xabc"], ["abc", "b"], "x"), (["xab", "d"], ["abc", "b"], "xa"),
     (["xab"], ["abc", "b"], "xa"), (["a", "b", "a"], ["abab"], "aba"), (["ab", "ab!"], ["bab"], "a")],
)  # fmt: skip
def test_where_an_answer_stops_hangs_on_no_token_border(
    pieces: list[str], stop: list[str], kept: str
) -> None:
    assert "".join(until_stop(pieces, stop)) == kept


BLOCKER = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "transformers", "onnx", "peft"}:
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Block())
sys.path.insert(0, sys.argv.pop(1))
"""


def run(
    code: str, *args: str, stdin: str | bytes = "", env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BLOCKER + code, EXPORT, *args]
    data = stdin if isinstance(stdin, bytes) else stdin.encode()
    done = subprocess.run(
        command, input=data, capture_output=True, timeout=60, env={**os.environ, **(env or {})}
    )
    return subprocess.CompletedProcess(command, done.returncode, done.stdout.decode(), done.stderr.decode())


def koff_run(
    *args: str, stdin: str | bytes = "", env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return run("from koff_export.cli import main; sys.exit(main())", *args, stdin=stdin, env=env)


def test_everything_but_the_export_imports_without_torch(exported: Exported) -> None:
    code = (
        "import koff_export, koff_export.cli\n"
        "assert not {'numpy', 'onnxruntime', 'tokenizers', 'jinja2'} & set(sys.modules), 'not lazy'\n"
        "import koff_export.bundle, koff_export.files, koff_export.text, koff_export.graph\n"
        "r = koff_export.Runtime.open(sys.argv[1], threads=1)\n"
        "print(list(r.generate_tokens([1, 5], 'law', 3)))\n"
        "print(r.chat_template().render([{'role': 'user', 'content': 'x'}]))"
    )
    done = run(code, str(exported.folder))
    assert done.returncode == 0 and "[user]x[assistant]" in done.stdout, done.stderr


def test_koff_run_answers_and_switches_memories(exported: Exported) -> None:
    folder, few = str(exported.folder), ("--max-new-tokens", "6", "--threads", "1")
    alone = {
        name: "".join(Runtime.open(folder).generate("hi", None if name == "none" else name, 6))
        for name in ("law", "music", "none")
    }
    done = koff_run(folder, "--memory", "law", "--prompt", "hi", *few)
    assert (done.returncode, done.stdout) == (0, alone["law"] + "\n"), done.stderr
    done = koff_run(folder, *few, stdin="/memory law\nhi\n/memory music\nhi\n/memory none\nhi\n")
    assert done.stdout == "".join(alone[name] + "\n" for name in ("law", "music", "none")), done.stderr
    assert koff_run(folder, "--chat", "--prompt", "hi", *few).returncode == 0


def test_a_full_conversation_forgets_its_oldest_turns(exported: Exported) -> None:
    """Positions: 128, of which the memory takes 7."""
    lines = [f"what comes after {n}?" for n in range(12)]
    chat = ("--memory", "law", "--chat", "--max-new-tokens", "6", "--threads", "1")
    done = koff_run(str(exported.folder), *chat, stdin="\n".join(lines))
    assert done.returncode == 0 and "forgotten" in done.stderr, done.stderr
    runtime = Runtime.open(exported.folder, threads=1)
    template, said, answers = runtime.chat_template(), [], []
    for line in lines:
        said.append({"role": "user", "content": line})
        while runtime.room(runtime.encode(template.render(said)), runtime.memory("law") or "law", 6) < 6:
            del said[:2]
        answers.append("".join(runtime.generate(template.render(said), "law", 6)))
        said.append({"role": "assistant", "content": answers[-1]})
    assert done.stdout == "".join(answer + "\n" for answer in answers)


def test_a_message_that_is_too_long_costs_no_conversation(
    exported: Exported, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from koff_export.cli import main

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    answers = []
    for lines in (["what comes next?", "and then?"], ["what comes next?", "x" * 200, "and then?"]):
        monkeypatch.setattr(sys, "stdin", Terminal("\n".join(lines)))
        assert main([str(exported.folder), "--chat", "--max-new-tokens", "6", "--threads", "1"]) == 0
        told = capsys.readouterr()
        answers.append(told.out)
        assert "forgotten" not in told.err and ("do not fit" in told.err) == (len(lines) == 3)
    assert answers[0] == answers[1]


def test_what_is_no_text_is_told(exported: Exported, tmp_path: Path) -> None:
    folder, few = str(exported.folder), ("--max-new-tokens", "4", "--threads", "1")
    (tmp_path / "b.jsonl").write_text('{"prompt": "\\ud800"}\n')
    for args, stdin, env in (
        ((), b"caf\xe9\n", {"PYTHONIOENCODING": "utf-8:strict"}),
        ((), b"caf\xe9\n", {"PYTHONIOENCODING": "utf-8:surrogateescape"}),  # as under LANG=C
        (("--batch", str(tmp_path / "b.jsonl")), b"", {}),
    ):
        done = koff_run(folder, *few, *args, stdin=stdin, env=env)
        assert done.returncode == 2 and "UTF-8" in done.stderr, done.stderr
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    ascii_only = {"PYTHONIOENCODING": "ascii:strict"}
    done = koff_run(folder, "--prompt", "hi", "--max-new-tokens", "20", "--threads", "1", env=ascii_only)
    assert done.returncode == 0, done.stderr


def test_koff_run_tells_what_the_system_refuses(exported: Exported, tmp_path: Path) -> None:
    folder, few = str(exported.folder), ("--max-new-tokens", "4", "--threads", "1")
    deep = tmp_path / "deep.jsonl"
    deep.write_text("[" * 100_000 + "]" * 100_000 + "\n")
    for args, says in (
        (("x" * 300, "--prompt", "hi"), "too long"),
        ((folder, *few, "--batch", str(deep)), "deep.jsonl, line 1"),
        ((folder, *few, "--score", str(deep)), "deep.jsonl, line 1"),
    ):
        done = koff_run(*args)
        assert done.returncode == 2 and says in done.stderr, done.stderr
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "koff_export.cli", folder, *few, "--prompt", "hi"]
        run = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert run.returncode == 2 and "No space left" in run.stderr and run.stderr.count("\n") == 1, run.stderr


def test_koff_run_answers_a_file(exported: Exported, tmp_path: Path) -> None:
    folder, few = str(exported.folder), ("--max-new-tokens", "6", "--threads", "1")
    rows = [
        {"prompt": "hi", "memory": "law", "id": 7},
        {"prompt": "there you are"},
        {"prompt": "hi", "memory": "none"},
    ]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = koff_run(folder, "--memory", "music", "--batch", str(tmp_path / "b.jsonl"), *few)
    told = [json.loads(line) for line in done.stdout.splitlines()]
    runtime = Runtime.open(folder)
    wanted = [("hi", "law"), ("there you are", "music"), ("hi", None)]
    assert [(r["prompt"], r["memory"]) for r in told] == wanted and told[0]["id"] == 7
    piped = koff_run(
        folder, "--memory", "music", "--batch", "-", *few, stdin=(tmp_path / "b.jsonl").read_text()
    )
    assert piped.stdout == done.stdout
    answered = koff_run(folder, "--batch", "-", *few, stdin='{"prompt": "hi", "answer": "gold"}\n')
    assert answered.returncode == 2 and "-, line 1: has an 'answer' already" in answered.stderr
    many = rows[:2] * 40
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in many))
    drawn = koff_run(folder, "--batch", str(tmp_path / "b.jsonl"), *few, "--temperature", "2", "--seed", "5")
    prompts, memories = [row["prompt"] for row in many], [row.get("memory") for row in many]
    expected = runtime.generate_batch(prompts, memories, 6, temperature=2.0, seed=5)
    assert [json.loads(line)["answer"] for line in drawn.stdout.splitlines()] == expected
    assert [r["answer"] for r in told] == ["".join(runtime.generate(p, m, 6)) for p, m in wanted]


def test_koff_run_scores(exported: Exported, tmp_path: Path) -> None:
    import math

    windows = [[1, 20, 30, 40], [1, 50, 60]]
    (tmp_path / "w.jsonl").write_text("".join(json.dumps({"tokens": w}) + "\n" for w in windows))
    (tmp_path / "t.txt").write_text("some plain text, longer than a window")
    runtime = Runtime.open(exported.folder, threads=1)
    nll, tokens = runtime.score(windows, "law")
    done = koff_run(str(exported.folder), "--memory", "law", "--score", str(tmp_path / "w.jsonl"), "--json")
    row = json.loads(done.stdout)
    assert row["tokens"] == tokens == 5 and row["perplexity"] == pytest.approx(math.exp(nll / 5), rel=1e-4)
    done = koff_run(str(exported.folder), "--score", str(tmp_path / "t.txt"))
    assert done.returncode == 0 and "over 37 tokens in 3 windows" in done.stdout, done.stdout + done.stderr


def test_koff_run_tells_mistakes_in_one_line(exported: Exported, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"tokens": [1, 2]}\n{"token": [1]}\n')
    (tmp_path / "wide.jsonl").write_text('{"prompt": "a"}\n\n{"prompt": "' + "x y " * 200 + '"}\n')
    (tmp_path / "long.jsonl").write_text('{"tokens": [5, 6]}\n' + json.dumps({"tokens": [5] * 999}) + "\n")
    (tmp_path / "none.jsonl").write_text('{"prompt": "a"}\n{"prompt": "a", "memory": "latin"}\n')
    (tmp_path / "near.jsonl").write_text('{"prompt": "a", "memroy": "law"}\n')
    folder = str(exported.folder)
    for args, message in (
        ((folder, "--memory", "latin", "--prompt", "x"), "it has: law, math, music"),
        ((str(tmp_path), "--prompt", "x"), "is not a bundle"),
        ((folder, "--score", str(tmp_path / "bad.jsonl")), "line 2"),
        ((folder, "--score", str(tmp_path / "absent")), "cannot read"),
        ((folder, "--prompt", "x", "--top-p", "7"), "top_p"),
        ((folder, "--prompt", "x", "--threads", "0"), "1 to 1024"),
        ((folder, "--prompt", "x", "--threads", "100000"), "1 to 1024"),
        ((folder, "--batch", str(tmp_path / "near.jsonl")), "unknown field 'memroy'; did you mean 'memory'?"),
        ((folder, "--batch", os.devnull), "holds no prompts"),
        ((folder, "--batch", str(tmp_path / "wide.jsonl")), "wide.jsonl, line 3: "),
        ((folder, "--batch", str(tmp_path / "none.jsonl")), "none.jsonl, line 2: "),
        ((folder, "--score", str(tmp_path / "long.jsonl")), "long.jsonl, line 2: 999 tokens"),
        ((folder, "--prompt", "x", "--stop", ""), "--stop: every answer ends before an empty text"),
        ((folder, "--batch", str(tmp_path / "bad.jsonl")), "line 1"),
        ((folder, "--prompt", "x", "--batch", str(tmp_path / "bad.jsonl")), "leave out the others"),
    ):
        done = koff_run(*args)
        assert done.returncode == 2 and message in done.stderr, done.stderr
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and not done.stdout


def test_two_wheels_in_one_environment_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from importlib import metadata

    from koff_export.cli import main

    monkeypatch.setattr(metadata, "distribution", lambda name: None)
    assert main(["bundle", "--prompt", "x"]) == 2
    assert "both installed" in capsys.readouterr().err


def test_a_snapshot_in_the_hubs_cache_opens(exported: Exported, copy: Path, tmp_path: Path) -> None:
    snapshot = hub_snapshot(copy, tmp_path / "hub")
    check_files(snapshot, open_manifest(snapshot))
    prompt = "the court"
    expected = Runtime.open(exported.folder).generate(prompt, memory="law", max_new_tokens=4)
    assert list(Runtime.open(snapshot).generate(prompt, memory="law", max_new_tokens=4)) == list(expected)


def test_links_of_a_snapshot_may_lead_to_its_own_blobs_alone(copy: Path, tmp_path: Path) -> None:
    snapshot = hub_snapshot(copy, tmp_path / "hub")
    other = tmp_path / "hub" / "models--someone--else" / "blobs"
    other.mkdir(parents=True)
    (snapshot / "tokenizer.json").resolve().rename(other / "secret")
    (snapshot / "tokenizer.json").unlink()
    (snapshot / "tokenizer.json").symlink_to(other / "secret")
    with pytest.raises(KoffError, match="leads out of"):
        check_files(snapshot, open_manifest(snapshot))


def test_a_bundle_on_the_hub_is_its_place(exported: Exported, copy: Path, tmp_path: Path) -> None:
    """Out of the hub's cache, which is all that there is without a network."""
    snapshot = hub_snapshot(copy, tmp_path / "hub")
    offline = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    asked = ("--memory", "law", "--prompt", "hi", "--max-new-tokens", "6", "--threads", "1")
    here = koff_run(str(exported.folder), *asked)
    for place in ("hf://someone/slim", f"hf://someone/slim@{snapshot.name}"):
        there = koff_run(place, *asked, env=offline)
        assert (there.returncode, there.stdout) == (0, here.stdout), there.stderr
    for place, message in (
        ("hf://someone/absent", "cannot be fetched"),
        ("hf://someone/slim@no-such-revision", "cannot be fetched"),
        ("hf://../../etc", "is no place on the hub"),
    ):
        done = koff_run(place, *asked, env=offline)
        assert done.returncode == 2 and message in done.stderr, done.stderr
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_lines_and_files_are_read_as_others_write_them(exported: Exported, tmp_path: Path) -> None:
    """Byte order marks, tabs, blanks in front of a command."""
    folder, few = str(exported.folder), ("--max-new-tokens", "6", "--threads", "1")
    plain = koff_run(folder, *few, stdin="/memory law\nhi\n").stdout
    for stdin in ("\ufeff/memory law\r\nhi\r\n", "/memory\tlaw\nhi\n", "  /memory  law \nhi\n"):
        assert koff_run(folder, *few, stdin=stdin).stdout == plain, stdin
    for name, text, option in (
        ("a.txt", "hello", "--score"), ("a.jsonl", '{"text": "hello"}\n', "--score"),
        ("b.jsonl", '{"prompt": "hi"}\n', "--batch"),
    ):  # fmt: skip
        found = []
        for mark in ("", "\ufeff"):
            (tmp_path / name).write_text(mark + text, encoding="utf-8")
            done = koff_run(folder, *few, option, str(tmp_path / name))
            assert done.returncode == 0, done.stderr
            found.append(done.stdout)
        piped = koff_run(
            folder, *few, option, "-", stdin=f"\ufeff{text}\r\n".encode(), env={"PYTHONIOENCODING": "latin-1"}
        )
        assert piped.returncode == 0, piped.stderr
        assert found[0] == found[1]
        if option == "--batch":
            assert json.loads(piped.stdout) == json.loads(found[0])


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--score", ""), "cannot read"),
        (("--batch", ""), "cannot read"),
        (("--json", "--prompt", "x"), "add --score"),
        (("--threads", "0", "--prompt", "x"), "threads: 0"),
    ],
)
def test_no_option_is_passed_over(exported: Exported, args: tuple[str, ...], says: str) -> None:
    done = koff_run(str(exported.folder), *args)
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ("<&-", 2),
        ("--batch - <&-", 2),
        ("--score - <&-", 2),
        ("--prompt hi >&-", 0),
        ("--batch {questions} >&-", 0),
    ],
)
def test_closed_streams_end_in_no_traceback(
    exported: Exported, tmp_path: Path, options: str, code: int
) -> None:
    (tmp_path / "q.jsonl").write_text('{"prompt": "hi"}\n')
    options = options.format(questions=tmp_path / "q.jsonl")
    line = f"{sys.executable} -m koff_export.cli {exported.folder} --max-new-tokens 2 {options}"
    done = subprocess.run(
        ["sh", "-c", line], stderr=subprocess.PIPE, timeout=60, check=False,
        env={**os.environ, "PYTHONPATH": EXPORT},
    )  # fmt: skip
    assert done.returncode == code and b"Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("place", ["onnx/model.onnx", "tokenizer.json", "onnx/memories/law.onnx_adapter"])
def test_a_link_to_itself_is_told(copy: Path, place: str) -> None:
    (copy / place).unlink()
    (copy / place).symlink_to(Path(place).name)
    done = koff_run(str(copy), "--memory", "law", "--prompt", "hi")
    assert done.returncode == 2 and "damaged or hostile" in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1


def test_a_path_of_half_a_character_is_told(copy: Path) -> None:
    told = json.loads((copy / "koff.json").read_text())
    path = "onnx/\ud800.onnx"
    told["graph"]["precisions"]["fp32"] = path
    told["files"][path] = {"sha256": "0" * 64, "size": 1}
    (copy / "koff.json").write_text(json.dumps(told))
    done = koff_run(str(copy), "--prompt", "hi")
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr

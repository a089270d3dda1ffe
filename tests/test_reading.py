"""Every mistake in a recipe is one line that names the place, the key and the mend."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from koff_export.errors import KoffError
from koff_prune.mistakes import _all_keys, _unknown_key
from koff_prune.reading import load_recipe
from koff_prune.recipe import Recipe, schema

RECIPES = Path(__file__).parent.parent / "recipes"
GOOD = "model: {source: org/name}\ndomains:\n  d:\n    source: text.txt\n"


@pytest.fixture
def write(tmp_path: Path):
    (tmp_path / "text.txt").write_text("text")

    def _write(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return _write


def mistakes(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(KoffError) as caught:
        load_recipe(path, list(overrides))
    return str(caught.value).splitlines()


CASES = [
    (
        "modle: {source: a/b}\ndomains:\n  d: {source: text.txt}\n",
        1,
        "unknown key `modle`; did you mean `model`?",
    ),
    (GOOD + "learn:\n  tokns: 5\n", 6, "unknown key `learn.tokns`; did you mean `learn.tokens`?"),
    (GOOD + "sparsity: 0.2\n", 5, "did you mean `structure.sparsity`?"),
    (GOOD + "learning_rate: 0.2\n", 5, "did you mean `learn.gates.learning_rate`?"),
    (GOOD + "xyzzy: 1\n", 5, "unknown key `xyzzy`; known here: version, seed, model,"),
    (GOOD + "    fles: 1\n", 5, "unknown key `domains.d.fles`; known here: source, split"),
    (GOOD + "    slit: {heldout: 0.5}\n", 5, "did you mean `domains.d.split`?"),
    (GOOD + "learn:\n  tokens: many\n", 6, "`learn.tokens` is 'many': must be a whole number"),
    (GOOD + "learn:\n  tokens: '5'\n", 6, "`learn.tokens` is '5': must be a whole number"),
    (GOOD + "learn: {tokens: 1.5}\n", 5, "`learn.tokens` is 1.5: must be a whole number"),
    (GOOD + "seed: true\n", 5, "`seed` is true: must be a whole number"),
    (GOOD + "seed: .nan\n", 5, "`seed` is nan: must be a whole number"),
    (GOOD + "structure:\n\n  sparsity: 1.2\n", 7, "`structure.sparsity` is 1.2: must be less than 1"),
    (GOOD + "structure: {sparsity: 0}\n", 5, "must be greater than 0"),
    (GOOD + "structure: {sparsity: .inf}\n", 5, "must be"),
    (GOOD + "structure: {units: ffn_neurons}\n", 5, "must be a list"),
    (GOOD + "structure: {units: []}\n", 5, "`structure.units`: must not be empty"),
    (GOOD + "structure: {units: [heads]}\n", 5, "`structure.units.0` is 'heads': must be 'ffn_neurons' or"),
    (GOOD + "memory: {kv: 5}\n", 5, "`memory.kv` is 5: must be a mapping of keys"),
    (GOOD + "memory: {lora: {target: q_proj}}\n", 5, "must be all-linear or a list of module names"),
    (GOOD + "compare: [magntude]\n", 5, "`compare.0.method` is 'magntude': must be 'dense', 'koff'"),
    (GOOD + "compare: [{method: wanda, learned_with: kv}]\n", 5, "are koff's, not wanda's"),
    (GOOD + "export: {formats: [onnx]}\n", 5, "must hold safetensors"),
    ("model: {source: 5}\ndomains: {d: {source: text.txt}}\n", 1, "must be text: put it in quotes"),
    (
        "model: {source: a/b}\ndomains:\n  d: {source: [text.txt, {path: a, hub: b}]}\n",
        3,
        "it has path and hub",
    ),
    ("model: {source: a/b}\ndomains:\n  d: {source: {text: a}}\n", 3, "it has none of them"),
    ("model: {source: a/b}\ndomains:\n  d: {source: {package: foo, files: a}}\n", 3, "name==version"),
    (
        "model: {source: a/b}\ndomains:\n  d: {source: {package: a==1, files: a}}\n",
        3,
        "needs `files` and `sha256`",
    ),
    (
        "model: {source: a/b}\ndomains:\n  d: {source: {path: text.txt, remove: '('}}\n",
        3,
        "not a regular expression",
    ),
    ("model: {source: a/b}\ndomains:\n  d: {source: {path: text.txt, text: '{a'}}\n", 3, "has a lone '{'"),
    ("model: {source: a/b}\ndomains:\n  'a b': {source: text.txt}\n", 3, "must be 1 to 64 letters"),
    ("model: {source: a/b}\ndomains:\n  ../a: {source: text.txt}\n", 3, "must be 1 to 64 letters"),
    ("model: {source: a/b}\ndomains: {}\n", 2, "`domains`: must not be empty"),
    ("model: {source: a/b}\ndomains:\n  d: {source: none.txt}\n", 3, "there is no such file or folder"),
    ("model: {source: none.gguf}\ndomains:\n  d: {source: text.txt}\n", 1, "there is no such file or folder"),
    (
        "model: {source: a/b, config: c.json}\ndomains:\n  d: {source: text.txt}\n",
        1,
        "`model.config` is 'c.json'",
    ),
    (GOOD + "  d: {source: text.txt}\n", 5, "`d` is named twice, first in line 3"),
    (GOOD + "learn: {tokens: 1, tokens: 2}\n", 5, "`tokens` is named twice"),
    (GOOD + "learn: [\n", 6, "expected"),
    (GOOD + "? [a]\n: b\n", 5, "a key must be a plain word"),
]


@pytest.mark.parametrize(("text", "line", "told"), CASES)
def test_one_line_per_mistake(write, text: str, line: int, told: str) -> None:
    found = mistakes(write(text))
    assert len(found) == 1
    assert f", line {line}:" in found[0]
    assert told in found[0]


def test_mistakes_come_in_the_order_of_the_file(write) -> None:
    found = mistakes(write("zzz: 1\n" + GOOD + "learn: {tokens: x}\nseed: -1\n"))
    assert [line.split(", line ")[1].split(":")[0] for line in found] == ["1", "6", "7"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "is empty"),
        ("- a\n", "must be a mapping"),
        ("domains: {d: {source: text.txt}}\n", "`model` is missing"),
        (GOOD + "memory: {lora: none, kv: none}\n", "settle_tokens"),
        ("a: &a [*a]\n", "nests too deeply"),
        (GOOD + "  D: {source: text.txt}\n", "differ only in case"),
        (GOOD + "  Complete: {source: text.txt}\n", "domains.Complete: the word means something else"),
    ],
)
def test_mistakes_of_the_whole(write, text: str, told: str) -> None:
    assert told in "\n".join(mistakes(write(text)))


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ("memory: {lora: {target: [q_proj, qproj]}}", "knows no qproj"),
        ("memory: {lora: {target: [lm_head]}}", "knows no lm_head"),
        ("memory: {lora: none}\ncompare: [{method: fisher, trained_with: lora}]", "compare[0]"),
        (
            "memory: {kv: none}\ncompare: [dense, {method: koff, learned_with: kv, trained_with: kv}]",
            "memory.kv",
        ),
        (
            "compare: [{method: koff, learned_with: lora, trained_with: lora, kv_tokens: 8}]",
            "compare[0].kv_tokens",
        ),
    ],
)
def test_a_row_cannot_ask_for_a_memory_that_the_recipe_does_not_have(
    tmp_path: Path, sections: str, told: str
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: {{source: m}}\ndomains: {{law: {{source: law}}}}\n{sections}\n")
    with pytest.raises(KoffError) as caught:
        load_recipe(path, check_files=False)
    assert told in str(caught.value) and "\n" not in str(caught.value)
    path.write_text("model: {source: m}\ndomains: {none: {source: law}}\n")
    with pytest.raises(KoffError, match="domains.none"):
        load_recipe(path, check_files=False)


def test_unreadable_files(tmp_path: Path) -> None:
    assert "no such file" in mistakes(tmp_path / "none.yaml")[0]
    assert "cannot be read" in mistakes(tmp_path)[0]
    (tmp_path / "latin.yaml").write_bytes("model: é".encode("latin-1"))
    assert "not UTF-8" in mistakes(tmp_path / "latin.yaml")[0]


@pytest.mark.parametrize(
    ("text", "value"), [("1e5", 100_000), ("2_000_000", 2_000_000), ("1.0e+5", 100_000), ("7", 7)]
)
def test_numbers_as_people_write_them(write, text: str, value: int) -> None:
    tokens = load_recipe(write(GOOD + f"learn: {{tokens: {text}}}\n")).learn.tokens
    assert (tokens, type(tokens)) == (value, int)
    assert load_recipe(write(GOOD), [f"learn.tokens={text}"]).learn.tokens == value
    rate = load_recipe(write(GOOD + "learn: {rates: {lora: 5e-4}}\n")).learn.rates.lora
    assert rate == 5e-4


def test_yaml_is_not_too_clever(write) -> None:
    text = GOOD.replace("  d:", "  no:").replace("org/name", "org/name, revision: 2024-01-01")
    recipe = load_recipe(write(text + "learn:\n"))
    assert list(recipe.domains) == ["no"]
    assert recipe.model.revision == "2024-01-01"
    assert recipe.learn == Recipe.model_fields["learn"].default


def test_merge_keys(write) -> None:
    text = GOOD.replace("source: text.txt", "source: &s {path: text.txt, limit: 5}")
    text += "  e:\n    source: {<<: *s, limit: 7}\n"
    recipe = load_recipe(write(text))
    assert [recipe.domains[n].sources[0].limit for n in "de"] == [5, 7]
    assert ", line 6: `domains.e.source.limit`" in mistakes(write(text.replace("7", "0")))[0]


def test_overrides(write) -> None:
    path = write(GOOD.replace("  d:", "  d.e:").replace("source: text.txt", "source: [text.txt]"))
    recipe = load_recipe(
        path, ["learn.gates.form=hard_concrete", "memory.kv=none", "domains.d.e.split.heldout=0.5"]
    )
    assert (recipe.learn.gates.form, recipe.memory.kind) == ("hard_concrete", "lora")
    assert recipe.domains["d.e"].split.heldout == 0.5
    for override, told in {
        "learn.tokns=1": "--set learn.tokns=1: unknown key `learn.tokns`; did you mean `learn.tokens`?",
        "domains.a.source.text={x}: {y}": "--set domains.a.source.text={x}: {y}: the value is not valid YAML",
        "learn.tokens=x": "--set learn.tokens=x: `learn.tokens` is 'x': must be a whole number",
        "seed": "write it as key.key=value",
        "=5": "write it as key.key=value",
        "lern.window=64": "--set lern.window=64: unknown key `lern`",
        "seed.a=5": "unknown key",
        "model.source.file=a": "which has no `file`",
        "learn.tokens=[": "not valid YAML",
        "model.source=./none": "there is no such file or folder",
        "model=org/name": "must be a mapping of keys; write {source: org/name}",
        "domains.d=./texts": "must be a mapping of keys; write {source: ./texts}",
        "memory=none": "set its parts: memory.lora=none, memory.kv=none",
        "domains.d.e.source={path: a.jsonl, text: {a}}": "put a template in quotes",
    }.items():
        found = mistakes(path, override)
        assert len(found) == 1, found
        if override != "seed.a=5":
            assert told in found[0]


@pytest.mark.parametrize("letter", ["", "x", "_"], ids=["dropped", "wrong", "underscore"])
def test_a_misspelt_key_finds_the_one_meant(letter: str) -> None:
    """Every key of the schema, with every one of its letters spoilt."""
    keys = list(_all_keys(Recipe))
    for key in keys:
        for at in range(len(key[-1]) if len(key[-1]) > 3 else 0):
            wrong = key[-1][:at] + letter + key[-1][at + 1 :]
            if any(wrong == other[-1] for other in keys):
                continue
            sentence, meant = _unknown_key((*key[:-1], wrong))
            assert f"unknown key `{'.'.join([*key[:-1], wrong])}`; did you mean `" in sentence
            # `_ates` is as near to learn.rates as to learn.gates.
            assert meant == key or meant[:-1] + (meant[-1][1:],) == (*key[:-1], key[-1][1:])


def test_paths_are_absolute_and_a_saved_recipe_means_the_same(write, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    recipe = load_recipe(write(GOOD.replace("org/name", "m")))
    assert recipe.model.source == str(tmp_path / "m")
    assert recipe.domains["d"].sources[0].path == str(tmp_path / "text.txt")
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe
    assert load_recipe(write(GOOD.replace("text.txt", "x")), check_files=False)


def test_digest_is_over_what_decides_the_result(write) -> None:
    def digest(*overrides: str) -> str:
        return load_recipe(write(GOOD), list(overrides)).digest()

    assert digest() == digest("compare=[wanda]") == digest("export.formats=[safetensors]")
    assert digest() == digest("model.config=text.txt")
    assert (
        len({digest(), digest("seed=1"), digest("learn.tokens=1"), digest("domains.d.split.heldout=0.2")})
        == 4
    )


def test_shipped_recipes_are_right() -> None:
    recipe = load_recipe(RECIPES / "smollm2" / "quickstart.yaml")
    assert list(recipe.domains) == ["python", "math", "medicine"]
    assert recipe.structure.sparsity == 0.12
    assert [row.method for row in recipe.compare] == ["magnitude", "wanda"]


def test_every_key_is_described() -> None:
    """By itself, or as the section that it is."""
    found = schema()
    sections = {"": found, **found["$defs"]}
    for name, section in sections.items():
        for form in (section, *section.get("anyOf", [])):
            for key, told in form.get("properties", {}).items():
                of = sections[told["$ref"].rpartition("/")[2]] if "$ref" in told else told
                described = [of, *of.get("anyOf", [])]
                assert any(one.get("description") for one in described), f"{name}.{key}"


def test_schema_knows_the_short_forms() -> None:
    defs = schema()["$defs"]
    assert {"type": "string"} in defs["TextSource"]["anyOf"]
    assert {"const": "none"} in defs["Memory"]["properties"]["kv"]["anyOf"]
    assert defs["CompareRow"]["anyOf"][0]["enum"][:2] == ["dense", "koff"]
    assert schema()["additionalProperties"] is False
    assert set(schema()["properties"]) == set(Recipe.model_fields)


def test_reading_a_recipe_needs_no_torch() -> None:
    heavy = "('torch', 'transformers', 'datasets')"
    code = f"import sys, koff_prune.reading; sys.exit(any(m in sys.modules for m in {heavy}))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_re_estimated_gates_need_a_start_in_nats(tmp_path: Path) -> None:
    """A start that is no cost is refused with the starts that are, also in a row of compare."""
    recipe = tmp_path / "recipe.yaml"
    text = "version: 1\nmodel: {source: org/model}\ndomains: {a: {source: {hub: org/data}}}\n"
    for more in (
        "learn: {gates: {start: wanda}}\n",
        "compare: [{method: koff, gates_start: wanda}]\n",
    ):
        recipe.write_text(text + more)
        with pytest.raises(KoffError, match="cannot begin from wanda.*choose start: fisher"):
            load_recipe(recipe)
    recipe.write_text(text + "compare: [{method: koff, gates_start: wanda, gates_learning_rate: 0}]\n")
    load_recipe(recipe)

"""Conversations: which tokens are learned, and a run on them from jsonl to bundle."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from model_helpers import tiny_model
from run_helpers import koff_prune, recipe_of
from text_helpers import jsonl, tiny_tokenizer
from tokenizers import Tokenizer
from torch.nn import functional

from koff_export.cli import main as koff_run
from koff_export.errors import KoffError
from koff_prune.chat import Chat, chat_of, chat_tokens, tokens, tokens_and_labels
from koff_prune.documents import documents
from koff_prune.domains import load_blocks, load_domain
from koff_prune.evaluate import window_losses
from koff_prune.memory import Memories
from koff_prune.reading import load_recipe
from koff_prune.recipe import Memory, TextSource

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Bye."},
    {"role": "user", "content": "Still here?"},
]


def tokenizer(template: str | None = TEMPLATE):  # type: ignore[no-untyped-def]
    made = tiny_tokenizer()
    made.chat_template = template
    return made


def test_the_assistants_turns_and_their_ends_are_learned() -> None:
    talk, made = chat_of(TALK), tokenizer()
    assert talk is not None
    ids = torch.tensor(chat_tokens(talk, made))
    assert made.decode(tokens(ids)) == made.apply_chat_template(TALK, tokenize=False)
    read, labels = tokens_and_labels(ids)
    assert made.decode(labels[labels >= 0]) == "Hello.</assistant>\nBye.</assistant>\n"
    assert torch.equal(read[labels >= 0], labels[labels >= 0])


def test_of_answers_that_are_rewritten_the_last_is_learned() -> None:
    """As Qwen3's template writes thoughts: into the last answer alone."""
    made = tokenizer(
        "{% for m in messages %}<{{ m.role }}>"
        "{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}"
        "{{ m.content }}</{{ m.role }}>\n"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    talk = chat_of(TALK)
    assert talk is not None
    ids = torch.tensor(chat_tokens(talk, made))
    assert made.decode(tokens(ids)) == made.apply_chat_template(TALK[:-1], tokenize=False)
    labels = tokens_and_labels(ids)[1]
    assert made.decode(labels[labels >= 0]) == "<think></think>Bye.</assistant>\n"


def test_a_call_of_a_tool_is_what_the_assistant_says() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look"}}]}
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
        "{% for c in m.tool_calls or [] %}[{{ c.function.name }}]{% endfor %}</{{ m.role }}>\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    talk, made = chat_of([{"role": "user", "content": "Hi", "tool_calls": None}, call]), tokenizer(template)
    assert talk is not None
    _, labels = tokens_and_labels(torch.tensor(chat_tokens(talk, made)))
    assert made.decode(labels[labels >= 0]) == "[look]</assistant>\n"
    with pytest.raises(ValueError, match='a message must be .*, not {"role": "user", "content": null}'):
        chat_of([{"role": "user", "content": None}, call])


def test_parts_of_text_are_one_text() -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo."}]
    asked = {"role": "user", "content": [{"type": "text", "text": "Hi"}]}
    plain = chat_of([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}])
    assert chat_of([asked, {"role": "assistant", "content": parts}]) == plain
    picture = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
    with pytest.raises(ValueError, match="text alone, not a part 'image_url'; leave it out"):
        chat_of([picture, {"role": "assistant", "content": "A cat."}])


def test_a_greeting_is_read_and_half_a_character_a_question_mark() -> None:
    hello = {"role": "assistant", "content": "Hello!"}
    assert chat_of([hello]) is None and chat_of([hello, {"role": "user", "content": "Hi"}]) is None
    talk = chat_of([hello, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a \ud800 b"}])
    assert talk is not None
    made = tokenizer()
    read, labels = tokens_and_labels(torch.tensor(chat_tokens(talk, made)))
    assert made.decode(read).startswith("<assistant>Hello!</assistant>\n<user>Hi")
    assert made.decode(labels[labels >= 0]) == "a ? b</assistant>\n"


def test_a_reply_is_tokenised_inside_its_conversation() -> None:
    """A tokenizer that begins a text with a space of its own does not begin every turn with one."""
    made = tokenizer()
    backend = json.loads(made.backend_tokenizer.to_str())
    backend["pre_tokenizer"] = {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "use_regex": False,
        "trim_offsets": False,
    }
    spaced = type(made)(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)), bos_token="<bos>", eos_token="<eos>"
    )
    spaced.chat_template = TEMPLATE
    talk = chat_of(TALK)
    assert talk is not None
    read, labels = tokens_and_labels(torch.tensor(chat_tokens(talk, spaced)))
    whole = spaced.apply_chat_template(TALK, tokenize=False)
    assert read.tolist() == spaced(whole, add_special_tokens=False)["input_ids"]
    assert spaced.decode(labels[labels >= 0]) == "Hello.</assistant>\nBye.</assistant>\n"


def test_windows_and_templates_do_not_both_begin_with_bos(tmp_path: Path) -> None:
    talks = [{"talk": [{"role": "user", "content": f"ask {n}"}, {"role": "assistant", "content": "yes " * 9}]}
             for n in range(90)]  # fmt: skip
    jsonl(tmp_path / "talks.jsonl", talks)
    source = {"path": "talks.jsonl", "messages": "talk"}
    recipe = load_recipe(recipe_of(tmp_path, domains={"chat": {"source": source}}))
    made = tokenizer("{{ bos_token }}" + TEMPLATE)
    blocks = load_domain("chat", recipe.domains["chat"], made, recipe, bos=made.bos_token_id)
    assert blocks.prefill[0] == made.bos_token_id
    for window in (blocks.prefill, *tokens(blocks.train)):
        assert (window == made.bos_token_id).sum() == 1


def test_what_is_no_conversation_is_told() -> None:
    assert chat_of(TALK[:2]) is None
    for wrong in ("text", [{"role": "user"}], [{"role": "user", "content": 3}]):
        with pytest.raises(ValueError, match="messages? must be "):
            chat_of(wrong)
    with pytest.raises(KoffError, match="no chat template"):
        chat_tokens(Chat(json.dumps(TALK)), tokenizer(None))
    rewriting = "{{ messages[-1].content }}{% if add_generation_prompt %}?{% endif %}"
    with pytest.raises(KoffError, match="begins an answer otherwise"):
        chat_tokens(Chat(json.dumps(TALK)), tokenizer(rewriting))


def test_a_windows_loss_is_that_of_the_assistants_tokens() -> None:
    model = tiny_model(num_hidden_layers=2)
    window = torch.tensor([chat_tokens(Chat(json.dumps(TALK)), tokenizer())])
    read, labels = tokens_and_labels(window)
    logits = model(input_ids=read).logits[0, :-1]
    said = labels[0, 1:] >= 0
    expected = functional.cross_entropy(logits[said], read[0, 1:][said])
    bare = Memories(model, Memory(lora=None, kv=None), {}, 0)
    assert window_losses(bare, window, None) == [pytest.approx(float(expected), abs=1e-5)]


@pytest.mark.timeout(200)
def test_a_run_learns_from_messages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    talks = [
        {
            "id": n,
            "talk": [{"role": "user", "content": f"ask {n}"}, {"role": "assistant", "content": "yes " * 9}],
        }
        for n in range(60)
    ]
    jsonl(tmp_path / "talks.jsonl", [*talks, {"id": 99, "talk": TALK[:1]}])
    recipe = recipe_of(
        tmp_path,
        domains={"chat": {"source": {"path": "talks.jsonl", "messages": "talk", "key": "{id}"}}},
        learn={"rates": {"lora": 0.02, "kv": 0.02}, "tokens": 2048, "settle_tokens": 256, "window": 32},
        evaluate={"window": 32},
        export={"formats": ["safetensors", "onnx"]},
    )
    made = tokenizer()
    made.save_pretrained(tmp_path / "model")
    answer = koff_prune(capsys, "apply", recipe, "--out", tmp_path / "run")
    assert answer.code == 0, answer.err
    blocks = load_blocks(tmp_path / "run" / "domains" / "chat.safetensors")
    assert (blocks.train < 0).any() and (blocks.train >= 0).any() and (blocks.prefill >= 0).all()
    learned = blocks.train[blocks.train >= 0]
    assert set(made.decode(learned)) <= set("yes </assistant>\n")
    rows = json.loads((tmp_path / "run" / "report.json").read_text())["rows"]
    dense, koff = rows[0]["perplexity"]["chat"], rows[1]["perplexity"]["chat"]
    assert koff < 0.9 * dense  # the assistant says one thing only
    held = json.loads((tmp_path / "run" / "domains" / "chat.heldout.jsonl").read_text().splitlines()[0])
    assert min(held["tokens"]) < 0 <= max(held["tokens"])
    # what a device scores is what the report says: the assistant's tokens alone, each of like weight
    scored = tmp_path / "run" / "domains" / "chat.heldout.jsonl"
    assert koff_run([str(tmp_path / "run/bundle"), "--score", str(scored), "--memory", "chat", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["perplexity"] == pytest.approx(koff, rel=1e-3)
    assert told["tokens"] == sum(blocks.heldout_counts) < blocks.heldout.numel()
    assert koff_prune(capsys, "analyze", tmp_path / "run").code == 0
    swaps = json.loads((tmp_path / "run" / "analysis.json").read_text())["swaps"]
    assert math.exp(swaps["nats"]["chat"]["chat"]) == pytest.approx(koff, rel=1e-5)
    cost = swaps["nats"]["chat"]["law"] - swaps["nats"]["chat"]["chat"]
    assert swaps["wrong_minus_right"]["chat"]["law"]["value"] == pytest.approx(cost, abs=1e-9)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ({"messages": "talk", "text": "{x}"}, "takes the place of `text`"),
        ({"messages": "nothing"}, "nothing"),
        ({"messages": "id"}, "talks.jsonl: record 1 under `messages: id`: messages must be a list"),
        (
            {"messages": "talk", "key": "{idd}"},
            'no record gives any key under `key: "{idd}"`; the fields are id',
        ),
    ],
)
def test_mistakes_are_one_sentence(
    source: dict[str, str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jsonl(tmp_path / "talks.jsonl", [{"id": n, "talk": TALK} for n in range(30)])
    recipe = recipe_of(tmp_path, domains={"chat": {"source": {"path": "talks.jsonl", **source}}})
    answer = koff_prune(capsys, "learn", recipe, "--out", tmp_path / "run")
    assert answer.code == 2 and says in answer.err and answer.err.count("error: ") == 1


def test_a_bad_message_is_located_and_lost_ones_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    talks = [{"talk": TALK if n % 3 else TALK[:2]} for n in range(9)]
    jsonl(tmp_path / "talks.jsonl", talks)
    source = TextSource(path=str(tmp_path / "talks.jsonl"), messages="talk")
    assert len(list(documents(source))) == 6
    told = " ".join(capsys.readouterr().err.split())
    assert "3 of 9 records have no assistant's turn that answers something in `talk`" in told
    jsonl(tmp_path / "talks.jsonl", [*talks, {"talk": [{"role": "usr", "content": 5}]}])
    with pytest.raises(
        KoffError, match=r'talks.jsonl: record 10 under .*, not {"role": "usr", "content": 5}'
    ):
        list(documents(source))


@pytest.mark.parametrize("said", ["", "  \n"])
def test_an_assistant_that_says_nothing_is_no_answer(said: str) -> None:
    """Unless it calls a tool."""
    silent = {"role": "assistant", "content": said}
    assert chat_of([{"role": "user", "content": "Hi"}, silent]) is None
    assert chat_of([{"role": "user", "content": "Hi"}, {**silent, "tool_calls": [{"name": "x"}]}]) is not None

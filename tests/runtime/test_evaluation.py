"""Scoring and tasks of mpo-run eval: the same figures as a plain forward pass, less work, and answers that are kept."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mpo_formats import ConfigError
from mpo_runtime.evaluation.harness import Evaluated, generation
from mpo_runtime.evaluation.kept import Kept, weights_digest
from mpo_runtime.evaluation.scoring import Scorer
from mpo_runtime.evaluation.tasks import jsonl_task, read_tasks
from mpo_runtime.measure import log_softmax
from tests.helpers import forward, granite_config, network, some_ids, write_folder

CHAT = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}bot:{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = write_folder(tmp_path_factory.mktemp("eval") / "little", granite_config(num_hidden_layers=1))
    (place / "chat_template.jinja").write_text(CHAT)
    return place


PROMPTS = [some_ids(20, seed=1), [*some_ids(12, seed=1), 7], some_ids(9, seed=2)]
PAIRS = [(prompt, some_ids(count, seed=count)) for prompt in PROMPTS for count in (1, 3, 1, 6)]


@pytest.mark.parametrize("chunk", [4, 256])
def test_scores_are_those_of_a_plain_forward_pass(folder: Path, chunk: int) -> None:
    model = network(folder)
    scorer = Scorer(model, chunk=chunk)
    found = dict(scorer.scores(PAIRS))
    assert sorted(found) == list(range(len(PAIRS)))
    for index, (prompt, following) in enumerate(PAIRS):
        scores = log_softmax(forward(model, [(prompt + following)[:-1]])[0])[len(prompt) - 1 :]
        nats = float(np.take_along_axis(scores, np.array(following)[:, None], -1).sum())
        assert found[index].nats == pytest.approx(nats, abs=1e-4)
        assert found[index].greedy == bool((scores.argmax(-1) == following).all())
    assert scorer.ran < sum(len(prompt) + len(following) - 1 for prompt, following in PAIRS) / 2


def test_a_greedy_continuation_is_recognised(folder: Path) -> None:
    model = network(folder)
    prompt = some_ids(8)
    best = int(forward(model, [prompt])[0, -1].argmax())
    first, second = (score for _, score in sorted(Scorer(model).scores([(prompt, [best]), (prompt, [best ^ 1])])))
    assert first.greedy and not second.greedy and first.nats > second.nats


def test_a_prompt_that_is_too_long_loses_its_beginning(folder: Path) -> None:
    model = network(folder)  # a context of 64
    prompt = some_ids(100, seed=3)
    [(_, long)] = Scorer(model).scores([(prompt, [5, 6])])
    [(_, short)] = Scorer(model).scores([(prompt[-63:], [5, 6])])
    assert long == short


def test_no_requests_are_no_work(folder: Path) -> None:
    assert list(Scorer(network(folder)).scores([])) == []


def test_scores_go_on_after_others(folder: Path) -> None:
    model = network(folder)
    scorer = Scorer(model)
    first = dict(scorer.scores(PAIRS[:2]))
    assert dict(scorer.scores([(some_ids(40, seed=9), [1])]))
    again = dict(scorer.scores(PAIRS[:2]))
    assert all(again[index].nats == pytest.approx(first[index].nats, abs=1e-5) for index in first)


def test_kept_answers_survive_a_line_that_was_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "kept" / "answers.jsonl"
    Kept(path).add("a", {"nats": 1.0})
    path.write_text(path.read_text() + '\n{"key": "b", "na')
    kept = Kept(path)
    assert kept.rows == {"a": {"nats": 1.0}}
    kept.add("c", {"nats": 2.0})
    assert Kept(path).rows == {"a": {"nats": 1.0}, "c": {"nats": 2.0}}


def test_the_digest_is_that_of_the_weights(folder: Path, tmp_path: Path) -> None:
    other = write_folder(tmp_path / "other", granite_config(num_hidden_layers=1), seed=5)
    assert weights_digest(folder) == weights_digest(folder) != weights_digest(other)


def test_answers_are_asked_for_once(folder: Path, tmp_path: Path) -> None:
    options = {"backend": "reference", "activations": "float"}
    seen: list[int] = []
    first = Evaluated(folder, tmp_path / "kept.jsonl", options, lambda stage, done, total: seen.append(done))
    scores = first.score(PAIRS)
    assert seen == list(range(1, len(PAIRS) + 1))
    text = first.generate("Once", {"max_gen_toks": 5})
    again = Evaluated(folder, tmp_path / "kept.jsonl", options)
    assert again.score(PAIRS) == scores and again.scorer.ran == 0
    again.model.generate = None  # type: ignore[assignment,method-assign]
    assert again.generate("Once", {"max_gen_toks": 5}) == text
    other = Evaluated(folder, tmp_path / "kept.jsonl", options | {"chi": 1})
    other.score(PAIRS[:1])
    assert other.scorer.ran > 0, "another χ is another model"
    for one in (first, again, other):
        one.model.close()


def test_generation_stops_at_a_text_and_refuses_what_it_does_not_know(folder: Path) -> None:
    stop, limit, sampling = generation({"until": ["\n", ""], "max_gen_toks": 7, "temperature": 0.8, "top_p": 0.9})
    assert (stop, limit, sampling.temperature) == (["\n"], 7, 0)
    _, limit, sampling = generation({"until": "x", "do_sample": True, "temperature": 0.8, "top_p": 0.9})
    assert (limit, sampling.temperature, sampling.top_p) == (256, 0.8, 0.9)
    with pytest.raises(ConfigError, match="num_beams: are not supported"):
        generation({"num_beams": 4})
    evaluated = Evaluated(folder, None, {"backend": "reference"})
    whole = evaluated.generate("a", {"max_gen_toks": 12})
    assert len(whole) > 2
    assert evaluated.generate("a", {"max_gen_toks": 12, "until": [whole[2]]}) == whole[: whole.index(whole[2])]
    with pytest.raises(ConfigError, match="raise --ctx-size"):
        evaluated.generate("a", {"max_gen_toks": 64})


def test_a_conversation_can_be_continued(folder: Path) -> None:
    evaluated = Evaluated(folder, None, {"backend": "reference"})
    messages = [{"role": "user", "content": "Hi"}, {"role": "bot", "content": "It is "}]
    assert evaluated.render(messages[:1], True) == "<s>user: Hi\nbot:"
    assert evaluated.render(messages, False) == "<s>user: Hi\n<s>bot: It is"


def jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_decide_about_the_kind_of_a_task(tmp_path: Path) -> None:
    choices = jsonl_task(jsonl(tmp_path / "copa.jsonl", {"query": "a", "choices": ["b"], "gold": 0}))
    assert choices["output_type"] == "multiple_choice" and choices["doc_to_text"] == "{{query.rstrip()}}"
    other = jsonl_task(jsonl(tmp_path / "mine.jsonl", {"query": "a", "choices": ["b"], "gold": 0}))
    assert other["doc_to_text"] == "{{query.rstrip()}}\nAnswer:"
    assert (
        jsonl_task(jsonl(tmp_path / "l.jsonl", {"context": "a", "continuation": "b"}))["output_type"] == "loglikelihood"
    )
    assert jsonl_task(jsonl(tmp_path / "g.jsonl", {"question": "a", "answer": "b"}))["output_type"] == "generate_until"


def test_tasks_that_cannot_be_read_are_refused_by_name(tmp_path: Path) -> None:
    assert read_tasks("piqa, arc_easy") == ["piqa", "arc_easy"]
    for text, words in [
        ("a,,b", "expected names or files"),
        (str(tmp_path / "none.jsonl"), "none.jsonl: cannot be read"),
        (str(tmp_path / "none.yaml"), "none.yaml: there is no such file"),
        (str(jsonl(tmp_path / "odd.jsonl", {"text": "a"})), "odd.jsonl: expected rows of .* found text"),
        (str(jsonl(tmp_path / "list.jsonl", [1])), "found list"),
    ]:
        with pytest.raises(ConfigError, match=words):
            read_tasks(text)
    (tmp_path / "broken.jsonl").write_text("{")
    with pytest.raises(ConfigError, match="line 1 is not JSON"):
        read_tasks(str(tmp_path / "broken.jsonl"))

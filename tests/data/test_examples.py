"""Example sets and their files: splits by content, ids, and errors that name file, line and column."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kd.config import ArithmeticDataConfig, ExampleFilesConfig
from kd.data import (
    AnswerExample,
    ChatExample,
    Message,
    PreferenceExample,
    PromptExample,
    prompt_set,
    read_answers,
    read_preferences,
    read_prompts,
    split_examples,
)
from kd.data.examples import content_of
from kd.errors import ConfigError, DataError
from kd.rewards import ANSWER_CHECKS

KNOWN_FINGERPRINT = "23f601915ce48d0146922ef4f3adb96dc6c7a95209fceedbf631f79c3db7c495"
Row = dict[str, object]
CHAT: Row = {
    "messages": [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hello?"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "Nothing."},
    ]
}


def _answers(count: int, per_prompt: int = 1) -> list[AnswerExample]:
    return [AnswerExample(f"prompt {i}", f"response {j}") for i in range(count) for j in range(per_prompt)]


def _write(path: Path, rows: Sequence[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _rows(count: int, *columns: str) -> list[Row]:
    return [{column: f"{column} {i}" for column in columns} for i in range(count)]


# --- parts -------------------------------------------------------------------------------------------------------


@given(
    numbers=st.lists(st.integers(0, 30), min_size=3).filter(lambda numbers: len(set(numbers)) >= 3),
    ratios=st.sampled_from([(0.1, 0.0), (0.5, 0.2), (0.3, 0.6)]),
)
@settings(max_examples=60, deadline=None)
def test_every_example_is_in_one_part_and_no_prompt_in_two(numbers: list[int], ratios: tuple[float, float]) -> None:
    examples = [PromptExample(str(number), str(i)) for i, number in enumerate(numbers)]
    parts = split_examples("made", examples, *ratios).parts
    together = [example for part in parts.values() for example in part]
    assert sorted(together, key=lambda e: int(e.answer)) == examples
    prompts = [{example.prompt for example in part} for part in parts.values()]
    assert all(prompts)
    assert sum(map(len, prompts)) == len(set(numbers))


def test_a_split_depends_on_content_alone() -> None:
    examples = _answers(200, per_prompt=3)
    one = split_examples("made", examples, 0.1, 0.1)
    other = split_examples("elsewhere", examples[::-1], 0.1, 0.1)
    assert one.parts == other.parts
    assert one.fingerprint == other.fingerprint
    assert [len(part) for part in one.parts.values()] == [480, 60, 60]
    assert list(one.parts["train"]) != sorted(one.parts["train"], key=lambda e: e.prompt)


def test_the_fingerprint_sees_content_and_parts() -> None:
    examples = _answers(20)
    changed = [AnswerExample(examples[0].prompt, "another response"), *examples[1:]]
    fingerprints = {
        split_examples("made", examples, 0.1).fingerprint,
        split_examples("made", changed, 0.1).fingerprint,
        split_examples("made", examples, 0.3).fingerprint,
        split_examples("made", [PromptExample(e.prompt, e.response) for e in examples], 0.1).fingerprint,
    }
    assert len(fingerprints) == 4


def test_an_added_prompt_moves_few_others() -> None:
    before = split_examples("made", _answers(200), 0.1).parts["validation"]
    after = split_examples("made", _answers(201), 0.1).parts["validation"]
    assert len(set(before) & set(after)) >= len(before) - 1


def test_ids_are_unique_over_all_parts() -> None:
    examples = split_examples("made", _answers(50), 0.2, 0.2)
    ids = [
        examples.first_id(part) + position for part in examples.parts for position in range(len(examples.parts[part]))
    ]
    assert ids == list(range(50))
    assert examples.first_id("train") == 0


def test_an_absent_part_is_refused() -> None:
    examples = split_examples("made", _answers(50), 0.2)
    with pytest.raises(DataError, match=r"no part 'test', only train, validation.*data\.test_ratio"):
        examples.part("test")
    assert examples.part("train") is examples.parts["train"]


def test_rows_of_one_prompt_are_not_told_to_change_what_is_so() -> None:
    with pytest.raises(DataError, match=r"1 different prompt.*2 parts.*one prompt stay together") as caught:
        split_examples("made", _answers(1, per_prompt=9), 0.1)
    assert "test_ratio" not in str(caught.value)
    with pytest.raises(DataError, match=r"data\.test_ratio=0"):
        split_examples("made", _answers(2, per_prompt=9), 0.1, 0.1)


def test_a_given_part_with_prompts_that_are_trained_on_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    given = {"validation": [AnswerExample(f"prompt {i}", "another") for i in range(6, 12)]}
    parts = split_examples("made", _answers(9), 0.1, separate=given).parts
    assert [len(part) for part in parts.values()] == [9, 6]
    assert "3 of 6 validation examples have a prompt that is also trained on" in caplog.text


def test_examples_that_are_encoded_as_before_keep_their_fingerprint() -> None:
    assert split_examples("made", _answers(20, 2), 0.1, 0.2).fingerprint == KNOWN_FINGERPRINT
    chat = ChatExample((Message("user", "a"), Message("assistant", "b")))
    marked = [split_examples("made", [*_answers(20), e], 0.1).fingerprint for e in (chat, AnswerExample("a", " "))]
    unmarked = []
    for example in (chat, AnswerExample("a", " ")):
        digest = hashlib.sha256()
        for part, examples in split_examples("made", [*_answers(20), example], 0.1).parts.items():
            digest.update(f"{part}:{len(examples)}:".encode())
            for each in examples:
                digest.update(hashlib.sha256(content_of(each).encode()).digest())
        unmarked.append(digest.hexdigest())
    assert not set(marked) & set(unmarked)


def test_a_reference_that_the_reward_cannot_use_is_refused_by_row(tmp_path: Path) -> None:
    rows = [{"prompt": f"prompt {i}", "answer": "N/A" if i == 100 else str(i)} for i in range(200)]
    path = _write(tmp_path / "a.jsonl", rows)
    config = ExampleFilesConfig(path=str(path))
    with pytest.raises(DataError, match=r"a\.jsonl, line 101: The reference answer 'N/A' is not a number"):
        prompt_set(config, ANSWER_CHECKS["exact_answer"])
    assert len(prompt_set(config).part("validation")) == 20
    with pytest.raises(DataError, match="not a number"):
        prompt_set(ArithmeticDataConfig(), ANSWER_CHECKS["exact_answer"])


def test_too_few_prompts_and_impossible_ratios_are_refused() -> None:
    with pytest.raises(DataError, match=r"2 different prompt.*3 parts"):
        split_examples("made", _answers(2, per_prompt=5), 0.1, 0.1)
    for ratios in [(0.0, 0.1), (0.6, 0.4), (0.1, -0.1), (float("nan"), 0.1)]:
        with pytest.raises(ConfigError, match=r"data\.val_ratio"):
            split_examples("made", _answers(9), *ratios)


# --- files -------------------------------------------------------------------------------------------------------


def test_rows_of_each_kind_are_read(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.jsonl", [*_rows(3, "prompt", "response"), CHAT])
    answers = [example for part in read_answers(path, 0.3).parts.values() for example in part]
    assert {AnswerExample(f"prompt {i}", f"response {i}") for i in range(3)} < set(answers)
    (chat,) = [example for example in answers if isinstance(example, ChatExample)]
    assert chat.response == "Nothing."
    assert [message.content for message in chat.context] == ["Be short.", "Hello?", "Hello.", "And?"]
    preferences = read_preferences(_write(tmp_path / "b.jsonl", _rows(4, "prompt", "chosen", "rejected")), 0.3)
    found = {example for part in preferences.parts.values() for example in part}
    assert PreferenceExample("prompt 2", "chosen 2", "rejected 2") in found
    prompts = read_prompts(_write(tmp_path / "c.jsonl", _rows(4, "prompt", "answer")), 0.3)
    assert PromptExample("prompt 1", "answer 1") in {example for part in prompts.parts.values() for example in part}


def test_a_folder_and_parquet_give_the_same_as_one_file(tmp_path: Path) -> None:
    rows = [*_rows(600, "prompt", "response")]
    one = read_answers(_write(tmp_path / "all.jsonl", rows), 0.1)
    folder = tmp_path / "folder" / "inner"
    folder.mkdir(parents=True)
    _write(folder / "a.jsonl", rows[:100])
    (folder / "notes.md").write_text("not examples")
    table = {name: [row[name] for row in rows[100:]] for name in ("prompt", "response")}
    pyarrow.parquet.write_table(pyarrow.table(table), folder / "b.parquet")
    assert read_answers(tmp_path / "folder", 0.1).fingerprint == one.fingerprint


def test_chats_are_read_from_parquet(tmp_path: Path) -> None:
    chats = [{"messages": [{"role": "user", "content": str(i)}, {"role": "assistant", "content": "."}]} for i in (1, 2)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(chats), tmp_path / "a.parquet")
    parts = read_answers(tmp_path, 0.5).parts
    assert {example.group for part in parts.values() for example in part} == {
        f'[{{"content":"{i}","role":"user"}}]' for i in (1, 2)
    }


def test_equal_chat_contexts_stay_together(tmp_path: Path) -> None:
    def chat(question: int, answer: int) -> Row:
        turns = [{"role": "user", "content": str(question)}, {"role": "assistant", "content": str(answer)}]
        return {"messages": turns}

    path = _write(tmp_path / "a.jsonl", [chat(i % 10, i) for i in range(50)])
    parts = read_answers(path, 0.3).parts
    contexts = [{example.group for example in part} for part in parts.values()]
    assert not contexts[0] & contexts[1]
    assert len(parts["validation"]) == 15


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"}', r"line 3 has no `response` \(or `messages`\), only: prompt"),
        ("{}", "line 3 has no `prompt`"),
        ('{"prompt": 3, "response": "a"}', "`prompt` in .*line 3 is of type int"),
        ('{"prompt": "a", "response": null}', "`response` in .*line 3 is of type NoneType"),
        ('{"prompt": "\\ud800", "response": "a"}', "line 3 is not valid Unicode"),
        ("[1]", "line 3 is a list, not a JSON object"),
        ("{", "line 3 is not JSON"),
        ('{"messages": "hello"}', "`messages` in .*line 3 is not a list"),
        ('{"messages": [{"role": "user"}]}', "a message of .*line 3 has no `content`"),
        ('{"messages": []}', "line 3: A chat needs at least two messages"),
        (
            '{"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]}',
            "line 3: .*the roles here are: assistant, user.*Cut the chat",
        ),
    ],
)
def test_a_bad_row_is_refused_by_file_and_line(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n\n' + line + "\n")
    with pytest.raises(DataError, match=message) as caught:
        read_answers(path, 0.5)
    assert "data.path: " in str(caught.value)
    assert "rows.jsonl" in str(caught.value)


def test_a_parquet_row_is_named(tmp_path: Path) -> None:
    table = pyarrow.table({"prompt": ["a"] * 300, "chosen": ["b"] * 300, "rejected": [*["c"] * 299, None]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"`rejected` in .*a\.parquet, row 300 is of type NoneType"):
        read_preferences(tmp_path, 0.1)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.parquet").write_text("not Parquet")
    (tmp_path / "empty").mkdir()
    for name, message in {
        "a.txt": "is a .txt; files of these types can be read: .jsonl .jsonl.gz .parquet .json .csv",
        "b.parquet": "cannot be read as Parquet",
        "empty": "names no file that can be read",
        "absent.jsonl": "does not exist",
    }.items():
        with pytest.raises(DataError, match=message):
            read_answers(tmp_path / name, 0.1)


def test_a_chat_without_an_answer_is_refused() -> None:
    with pytest.raises(DataError, match="the last of them the assistant's"):
        ChatExample((Message("user", "a"), Message("user", "b")))

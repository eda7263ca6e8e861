"""Loading data sets: small ones written here, in every form, whole and broken."""

import json
import logging
import os
import re
import tempfile
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tiny_align.align.data.data_report import DataReport
from tiny_align.align.data.datasets import (
    Utterance,
    clean_chat,
    leave_out_unknown_splits,
    load_dataset,
    split_of,
)
from tiny_align.runtime.errors import AudioError, DataError

RATE = 16_000  # Hz


def write_audio(path, seconds=0.5, hz=440.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    time = np.arange(round(seconds * RATE)) / RATE
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * hz * time), RATE)
    return path


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_folder(tmp_path, rows):
    """An audiofolder with these rows and the audio they name."""
    for row in rows:
        write_audio(tmp_path / row["file_name"])
    write_rows(tmp_path / "metadata.jsonl", rows)
    return tmp_path


def mark(start_ms, end_ms):
    return f"\x15{start_ms}_{end_ms}\x15"


def write_chat(
    path, tiers, participants="PAR Participant, INV Investigator", media="session", ids=""
):
    header = f"@UTF8\n@Begin\n@Languages:\teng\n@Participants:\t{participants}\n{ids}"
    header += f"@Media:\t{media}, audio\n" if media else ""
    path.write_text(header + "".join(f"{tier}\n" for tier in tiers) + "@End\n", encoding="utf-8")
    return path


# --- utterances ---


def test_an_utterance_loads_its_whole_file(tmp_path):
    audio = Utterance(write_audio(tmp_path / "a.wav"), "hello", "train").load(8_000)
    assert audio.dtype == np.float32 and len(audio) == 4_000


def test_an_utterance_loads_its_part(tmp_path):
    path = write_audio(tmp_path / "a.wav", seconds=2.0)
    assert len(Utterance(path, "hello", "train", 0.5, 1.0).load(RATE)) == RATE // 2
    assert len(Utterance(path, "hello", "train", 0.5, None).load(RATE)) == RATE * 3 // 2
    assert len(Utterance(path, "hello", "train", None, 0.5).load(RATE)) == RATE // 2
    with pytest.raises(AudioError, match="past the end"):
        Utterance(path, "hello", "train", 1.0, 9.0).load(RATE)


# --- (a) a folder with metadata ---


def test_a_folder_with_metadata_jsonl(tmp_path):
    rows = [
        {"file_name": "a.wav", "transcription": "Hello there.", "split": "train", "speaker": "ana"},
        {"file_name": "b.flac", "transcription": "Good bye", "split": "test"},
    ]
    assert load_dataset(write_folder(tmp_path, rows)) == [
        Utterance(tmp_path / "a.wav", "Hello there.", "train", speaker="ana"),
        Utterance(tmp_path / "b.flac", "Good bye", "test"),
    ]
    assert load_dataset(str(tmp_path)) == load_dataset(tmp_path / "metadata.jsonl")


def test_a_folder_with_metadata_csv(tmp_path):
    write_audio(tmp_path / "clips" / "a.wav")
    text = '\ufefffile_name,transcription,split\r\nclips/a.wav,"Yes, ""now""",dev\r\n'
    (tmp_path / "metadata.csv").write_bytes(text.encode())
    assert load_dataset(tmp_path) == [
        Utterance(tmp_path / "clips/a.wav", 'Yes, "now"', "validation")
    ]


@pytest.mark.parametrize("field", ["transcription", "text", "sentence"])
def test_the_text_may_be_in_any_of_its_columns(tmp_path, field):
    folder = write_folder(tmp_path, [{"file_name": "a.wav", field: "hello"}])
    assert load_dataset(folder)[0].text == "hello"


def test_duration_and_offset_in_metadata_are_ignored(tmp_path):
    row = {"file_name": "a.wav", "text": "hello", "duration": 0.4, "offset": 0.1}
    assert load_dataset(write_folder(tmp_path, [row]))[0].end_s is None


def test_a_folder_s_name_sets_the_split_unless_the_row_does(tmp_path):
    rows = [{"file_name": f"{folder}/a.wav", "text": "hello"} for folder in ("train", "test")]
    rows.append({"file_name": "test/b.wav", "text": "hello", "split": "train"})
    assert [u.split for u in load_dataset(write_folder(tmp_path, rows))] == [
        "train",
        "test",
        "train",
    ]


def test_without_a_split_about_one_text_in_five_is_for_testing(tmp_path):
    write_audio(tmp_path / "a.wav")
    rows = [{"file_name": "a.wav", "text": f"sentence number {i}"} for i in range(500)]
    rows += [{"file_name": "a.wav", "text": f"Sentence  number {i}"} for i in range(500)]
    write_rows(tmp_path / "metadata.jsonl", rows)
    splits = [u.split for u in load_dataset(tmp_path)]
    assert splits == [u.split for u in load_dataset(tmp_path)]
    assert splits[:500] == splits[500:]  # repetitions stay together
    assert 0.15 < splits.count("test") / 1000 < 0.25
    assert set(splits) == {"train", "test"}


def test_a_text_is_nfc_on_one_line_in_its_own_case(tmp_path):
    decomposed = unicodedata.normalize("NFD", "Où est\nle Café ?")
    row = {"file_name": "a.wav", "text": f"  {decomposed} "}
    assert load_dataset(write_folder(tmp_path, [row]))[0].text == "Où est le Café ?"


def test_blank_lines_and_line_separators_are_no_rows(tmp_path):
    write_audio(tmp_path / "a.wav")
    row = json.dumps({"file_name": "a.wav", "text": "one\u2028two"}, ensure_ascii=False)
    (tmp_path / "metadata.jsonl").write_text(f"\n{row}\n\n", encoding="utf-8")
    assert [u.text for u in load_dataset(tmp_path)] == ["one two"]


def test_a_speaker_of_a_folder(tmp_path):
    rows = [
        {"file_name": "a.wav", "text": "hello", "speaker_id": 7},
        {"file_name": "b.wav", "text": "bye"},
    ]
    folder = write_folder(tmp_path, rows)
    assert [u.text for u in load_dataset(folder, speaker="7")] == ["hello"]
    with pytest.raises(DataError, match=r"nothing by speaker 'ana'.*\(none given\), 7"):
        load_dataset(folder, speaker="ana")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"text": "hello"},
            "line 2: no text in the field file_name or audio_filepath or .*; the row has text",
        ),
        (
            {"file_name": "a.wav"},
            "line 2: no text in the field transcription or text or .*; the row has file_name",
        ),
        ({"file_name": "a.wav", "text": " "}, "line 2: no text in the field text, it is empty"),
        (
            {"file_name": "a.wav", "text": 7},
            "line 2: the field text holds the number 7; expected text",
        ),
        (
            {"file_name": "a.wav", "text": 6.5},
            "line 2: the field text holds the number 6.5; expected text",
        ),
        (
            {"file_name": "a.wav", "text": ["a"]},
            "line 2: the field text holds a list; expected text",
        ),
        (
            {"file_name": "a.wav", "text": {"a": 1}},
            "line 2: the field text holds an object; expected text",
        ),
        ({"file_name": "a.wav", "text": True}, "line 2: the field text holds true; expected text"),
        ({"file_name": "a.wav", "text": None}, "line 2: the field text holds null; expected text"),
        (
            {"file_name": 3, "text": "hi"},
            "line 2: the field file_name holds the number 3; expected text",
        ),
        (
            {"file_name": "a.wav", "text": "hi", "split": 1},
            "line 2: the field split holds the number 1; expected train",
        ),
        (
            {"file_name": "a.wav", "text": "hi", "speaker": ["ana"]},
            "line 2: the field speaker holds a list",
        ),
        (
            {"file_name": "a.wav", "text": "hi \ud800"},
            "line 2: the field text holds half a character",
        ),
        (
            {"file_name": "absent.wav", "text": "hi"},
            r"line 2: audio file .*absent\.wav does not exist",
        ),
        ({"file_name": ".", "text": "hi"}, "line 2: audio file .* does not exist"),
        ([1, 2], "line 2: got a list; expected one JSON object per line"),
    ],
)
def test_a_bad_row_is_refused_naming_the_line(tmp_path, row, message):
    write_audio(tmp_path / "a.wav")
    write_rows(tmp_path / "metadata.jsonl", [{"file_name": "a.wav", "text": "hello"}, row])
    with pytest.raises(DataError, match=rf"metadata\.jsonl, {message}"):
        load_dataset(tmp_path)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            "file_name,text\na.wav,hello\na.wav\n",
            "line 3: 1 field where the header has 2: add what is missing",
        ),
        (
            "file_name,text\na.wav,on, please\n",
            "line 2: 3 fields where the header has 2: quote a .* holds a comma",
        ),
        (
            "file_name;text\na.wav;on; please\n",
            "line 2: 3 fields where the header has 2: quote a .* holds a semicolon",
        ),
        (
            "file_name\ttext\na.wav\ton\tplease\n",
            "line 2: 3 fields where the header has 2: take the tab out",
        ),
        ('file_name,text\na.wav,"two\nlines"\na.wav,b,c\n', "line 4: 3 fields"),
        ("file_name,text,text\na.wav,hello,bye\n", "line 1: the header has the name 'text' twice"),
        ("file_name,text, Text\na.wav,hello,bye\n", "line 1: the header has the name 'text' twice"),
        ("file_name,text,\na.wav,hello,bye\n", "line 2: 'bye' stands under an empty name"),
        ("a.wav,hello\nb.wav,bye\n", "the first line, 'a.wav,hello', is no header"),
        ("LJ001|hello\n", "the first line, 'LJ001|hello', is no header"),
        (f"file_name,text\na.wav,{'x' * 200_000}\n", "line 2: invalid CSV"),
        (
            'file_name,text\na.wav,hello\na.wav,"hello\na.wav,bye\n',
            "line 3: invalid CSV in the row that begins here",
        ),
        ('file_name,text\na.wav,"hello" she said\n', "line 2: invalid CSV"),
    ],
)
def test_a_csv_file_that_breaks_the_rules_is_refused_naming_the_line(tmp_path, table, message):
    write_audio(tmp_path / "a.wav")
    (tmp_path / "metadata.csv").write_text(table)
    with pytest.raises(DataError, match=rf"metadata\.csv(, |: ){message}"):
        load_dataset(tmp_path)


@pytest.mark.parametrize(
    "table",
    [
        'file_name,text\r\na.wav,"Turn on, ""now"",\r\nplease"\r\n',
        '\ufefffile_name;text\r\na.wav;"Turn on, ""now"",\r\nplease"\r\n',
        'file_name\ttext\na.wav\tTurn on, "now", please\n',
        'file_name\ttext\na.wav\t"Turn on, ""now"", please"\n',
        '\n File_Name , Text ,,\n,,,\na.wav,"Turn on, ""now"", please",,\n\n',
    ],
    ids=[
        "RFC 4180",
        "Excel's with semicolons",
        "tabs",
        "tabs with quotes",
        "empty columns, empty rows",
    ],
)
def test_csv_is_read_by_the_rules_of_its_standard(tmp_path, table):
    write_audio(tmp_path / "a.wav")
    (tmp_path / "metadata.csv").write_bytes(table.encode())
    assert [u.text for u in load_dataset(tmp_path)] == ['Turn on, "now", please']


def test_a_json_array_is_read_like_lines(tmp_path):
    write_audio(tmp_path / "a.wav")
    rows = [{"file_name": "a.wav", "text": "one"}, {"file_name": "a.wav", "text": "two"}]
    (tmp_path / "metadata.json").write_text(json.dumps(rows, indent=1))
    assert [u.text for u in load_dataset(tmp_path)] == ["one", "two"]
    (tmp_path / "metadata.json").write_text(json.dumps([*rows, {"file_name": "a.wav", "text": 3}]))
    with pytest.raises(
        DataError, match=r"metadata\.json, row 3: the field text holds the number 3"
    ):
        load_dataset(tmp_path)


def test_invalid_json_is_refused_naming_the_line(tmp_path):
    (tmp_path / "metadata.jsonl").write_text('\n{"file_name": \n')
    with pytest.raises(DataError, match=r"metadata\.jsonl, line 2: invalid JSON"):
        load_dataset(tmp_path)
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "a.wav", "text": "one", "text": "two"}\n'
    )
    with pytest.raises(DataError, match=r"metadata\.jsonl, line 1: .*'text' twice"):
        load_dataset(tmp_path)
    (tmp_path / "metadata.jsonl").write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"metadata\.jsonl: invalid JSON"):
        load_dataset(tmp_path)


def test_a_file_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "metadata.csv").write_bytes("file_name,text\na.wav,café\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"metadata\.csv, line 2: .*save it as UTF-8"):
        load_dataset(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_named_with_its_remedy(tmp_path, encoding):
    (tmp_path / "metadata.csv").write_bytes("file_name;text\na.wav;hello\n".encode(encoding))
    with pytest.raises(DataError, match=r"metadata\.csv: is UTF-16 .*'CSV UTF-8'"):
        load_dataset(tmp_path)


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "talk.cha"])
def test_a_folder_in_place_of_a_file_is_named(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(DataError, match=rf"{name}: cannot be read \(Is a directory\)"):
        load_dataset(tmp_path)


@pytest.fixture
def unprivileged_folder():
    """A folder in which this process may not read everything, even if root runs the tests."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        is_root = os.geteuid() == 0
        if is_root:
            os.seteuid(65_534)
        yield Path(folder)
        if is_root:
            os.seteuid(0)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="the right to read is Unix's")
@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "talk.cha", "."])
def test_a_path_without_permission_is_named(unprivileged_folder, name):
    path = unprivileged_folder / name
    user = os.geteuid()
    os.seteuid(os.getuid())
    if not path.is_dir():
        path.write_text("file_name,text\n")
    path.chmod(0)
    os.seteuid(user)
    message = rf"{re.escape(str(path))}.*cannot be read \(Permission denied\)"
    with pytest.raises(DataError, match=message):
        load_dataset(unprivileged_folder)


def test_two_tables_that_differ_in_form_only_are_refused(tmp_path):
    for name in ("metadata.jsonl", "metadata.csv"):
        (tmp_path / name).touch()
    message = r"holds both metadata\.jsonl and metadata\.csv; expected one of them"
    with pytest.raises(DataError, match=message):
        load_dataset(tmp_path)


def test_a_path_that_is_no_data_set_is_refused(tmp_path):
    forms = r"expected .*metadata\.jsonl.*manifest.*\.cha"
    with pytest.raises(DataError, match=rf"no such file or folder; {forms}"):
        load_dataset(tmp_path / "absent")
    with pytest.raises(DataError, match=rf"a folder of no known form; {forms}"):
        load_dataset(tmp_path)
    with pytest.raises(DataError, match="a file of no known form"):
        load_dataset(write_audio(tmp_path / "a.wav"))
    (tmp_path / "rows.json").touch()
    with pytest.raises(DataError, match=r"a folder of no known form \(give rows\.json itself"):
        load_dataset(tmp_path)


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_an_empty_table_has_no_utterances(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(DataError, match="no utterances"):
        load_dataset(tmp_path)


# --- (b) a manifest ---


def test_a_manifest(tmp_path):
    for name in ("clips/a.wav", "elsewhere/b.wav"):
        write_audio(tmp_path / name)
    rows = [
        {"audio_filepath": "clips/a.wav", "text": "one", "split": "test", "speaker": "ana"},
        {
            "audio_filepath": "clips/a.wav",
            "text": "two",
            "split": "train",
            "offset": 0.1,
            "duration": 0.25,
        },
        {
            "audio_filepath": str(tmp_path / "elsewhere/b.wav"),
            "text": "three",
            "split": "train",
            "duration": 0.5,
        },
        {
            "audio_filepath": "clips/a.wav",
            "text": "four",
            "split": "train",
            "offset": 0.1,
            "duration": None,
        },
    ]
    a, b = tmp_path / "clips/a.wav", tmp_path / "elsewhere/b.wav"
    expected = [
        Utterance(a, "one", "test", speaker="ana"),
        Utterance(a, "two", "train", 0.1, 0.35),
        Utterance(b, "three", "train", None, 0.5),
        Utterance(a, "four", "train", 0.1, None),
    ]
    for name in ("set.jsonl", "set.json"):
        assert load_dataset(write_rows(tmp_path / name, rows)) == expected
    assert [len(u.load(RATE)) for u in expected] == [8000, 4000, 8000, 6400]
    assert load_dataset(tmp_path / "set.json", speaker="ana") == expected[:1]


def test_a_manifest_without_splits(tmp_path):
    write_audio(tmp_path / "test/a.wav")
    rows = [{"audio_filepath": "test/a.wav", "text": "one"}]
    assert load_dataset(write_rows(tmp_path / "set.jsonl", rows))[0].split == "test"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": None}, "the field text holds null; expected text"),
        ({"audio_filepath": "b.wav"}, r"audio file .*b\.wav does not exist"),
        ({"offset": -1}, "offset is -1; expected seconds"),
        ({"offset": "1.0"}, "offset is '1.0'; expected seconds"),
        ({"duration": True}, "duration is True; expected seconds"),
        ({"duration": float("nan")}, "duration is nan; expected seconds"),
        ({"duration": 10**400}, "duration is 10+; expected seconds"),
        ({"duration": 0}, "duration is 0; expected seconds above 0"),
    ],
)
def test_bad_rows_of_a_manifest(tmp_path, fields, message):
    write_audio(tmp_path / "a.wav")
    path = write_rows(tmp_path / "set.jsonl", [{"audio_filepath": "a.wav", "text": "one"} | fields])
    with pytest.raises(DataError, match=rf"set\.jsonl, line 1: {message}"):
        load_dataset(path)


# --- file names and folders as they occur ---


@pytest.mark.parametrize(("written", "on_disk"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_name_in_another_normalisation_form_is_found(tmp_path, written, on_disk):
    audio = write_audio(tmp_path / unicodedata.normalize(on_disk, "Größe/Müller é.wav"))
    row = {"file_name": unicodedata.normalize(written, "Größe/Müller é.wav"), "text": "hello"}
    write_rows(tmp_path / "metadata.jsonl", [row])
    assert load_dataset(tmp_path)[0].audio == audio

    write_audio(tmp_path / unicodedata.normalize(on_disk, "Gespräch.wav"))
    tiers = [f"*PAR:\thello . {mark(0, 400)}"]
    talk = write_chat(tmp_path / "a.cha", tiers, media=unicodedata.normalize(written, "Gespräch"))
    assert load_dataset(talk)[0].text == "hello."


@pytest.mark.parametrize(
    "written",
    ["my clips\\a 1.wav", "./my clips/a 1.wav", " my clips/a 1.wav ", "{}/my clips/a 1.wav"],
)
def test_windows_paths_absolute_paths_and_spaces_are_found(tmp_path, written):
    audio = write_audio(tmp_path / "my clips/a 1.wav")
    row = {"file_name": written.format(tmp_path), "text": "hello"}
    write_rows(tmp_path / "metadata.jsonl", [row])
    assert load_dataset(tmp_path)[0].audio == audio


def test_common_voice(tmp_path, caplog):
    """One table per split, whose paths leave out the folder clips/; other tables are not read."""
    for i, split in enumerate(("train", "dev", "test", "validated")):
        write_audio(tmp_path / f"clips/{i}.wav")
        (tmp_path / f"{split}.tsv").write_text(
            f'client_id\tpath\tsentence\nx\t{i}.wav\t"Oh", he said.\n'
        )
    found = load_dataset(tmp_path)
    assert {(u.split, u.audio.name) for u in found} == {
        ("train", "0.wav"),
        ("validation", "1.wav"),
        ("test", "2.wav"),
    }
    assert {u.text for u in found} == {'"Oh", he said.'}
    assert "not read, as its name is no split's: validated.tsv" in caplog.text


def test_metadata_in_each_splits_folder(tmp_path):
    for folder in ("data/train", "data/validation", "data/test"):
        write_audio(tmp_path / folder / "a.wav")
        (tmp_path / folder / "metadata.csv").write_text("file_name,text\na.wav,hello\n")
    assert sorted(u.split for u in load_dataset(tmp_path)) == ["test", "train", "validation"]


def test_a_manifest_as_csv(tmp_path):
    write_audio(tmp_path / "a.wav", seconds=1.0)
    path = tmp_path / "set.csv"
    path.write_text("audio_filepath,text,offset,duration\na.wav,one,0.25,0.5\na.wav,two,,\n")
    assert [(u.start_s, u.end_s) for u in load_dataset(path)] == [(0.25, 0.75), (None, None)]
    path.write_text('audio_filepath,text,offset\na.wav,one,"0,25"\n')
    with pytest.raises(DataError, match=r"line 2: offset is '0,25'; expected seconds"):
        load_dataset(path)


# --- (c) CHAT ---


def test_a_chat_transcript(tmp_path, caplog):
    write_audio(tmp_path / "session.wav", seconds=3.0)
    tiers = [
        f"*INV:\twhat happened ? {mark(0, 500)}",
        f"*PAR:\tI went &-um to the\n\tstore . {mark(500, 1500)}",
        "%mor:\tpro|I v|go prep|to det|the\n\tn|store .",
        f"*PAR:\tthen home . {mark(1500, 2250)}",
        "*PAR:\tno mark .",
        f"*PAR:\tbackwards . {mark(900, 100)}",
        f"*PAR:\txxx and xxx . {mark(2250, 2500)}",
        f"*PAR:\t&=laughs . {mark(2500, 2600)}",
    ]
    path = write_chat(tmp_path / "session.cha", tiers)
    with caplog.at_level(logging.WARNING):
        utterances = load_dataset(path)
    audio = tmp_path / "session.wav"
    assert [(u.audio, u.text, u.start_s, u.end_s, u.speaker) for u in utterances] == [
        (audio, "I went to the store.", 0.5, 1.5, "PAR"),
        (audio, "then home.", 1.5, 2.25, "PAR"),
    ]
    assert {u.split for u in utterances} <= {"train", "test"}
    assert len(utterances[0].load(RATE)) == RATE
    expected = (
        "left out 5: ",
        "by another speaker (1, ",
        "without time marks (1, ",
        "ends before it begins (1, ",
        "unintelligible (1, ",
        "without words (1, e.g. session.cha: *PAR: &=laughs",
    )
    for part in expected:
        assert part in caplog.text


def test_nothing_is_logged_if_nothing_is_left_out(tmp_path, caplog):
    write_audio(tmp_path / "session.wav")
    load_dataset(write_chat(tmp_path / "a.cha", [f"*PAR:\thello . {mark(0, 500)}"]))
    assert not caplog.records


def test_a_folder_of_transcripts(tmp_path):
    write_audio(tmp_path / "one.wav")
    write_audio(tmp_path / "media" / "two.FLAC")
    write_chat(tmp_path / "one.cha", [f"*PAR:\tfirst . {mark(0, 400)}"], media="one")
    write_chat(tmp_path / "two.cha", [f"*PAR:\tsecond . {mark(0, 400)}"], media="two")
    assert [(u.text, u.audio.name) for u in load_dataset(tmp_path)] == [
        ("first.", "one.wav"),
        ("second.", "two.FLAC"),
    ]


def test_several_marks_span_the_utterance_and_old_ones_are_read(tmp_path):
    write_audio(tmp_path / "session.mp3", seconds=3.0)
    old = '\x15%snd:"session"_2000_2500\x15'
    tiers = [f"*PAR:\tone {mark(0, 400)} two {mark(500, 900)} .", f"*PAR:\tthree . {old}"]
    utterances = load_dataset(write_chat(tmp_path / "a.cha", tiers, media="session.mp3"))
    assert [(u.text, u.start_s, u.end_s) for u in utterances] == [
        ("one two.", 0.0, 0.9),
        ("three.", 2.0, 2.5),
    ]


def test_speakers_of_a_transcript(tmp_path):
    write_audio(tmp_path / "session.wav")
    tiers = [f"*CHI:\tcookie . {mark(0, 200)}", f"*MOT:\there . {mark(200, 400)}"]
    both = write_chat(tmp_path / "both.cha", tiers, participants="CHI Target_Child, MOT Mother,")
    assert [u.text for u in load_dataset(both, speaker="MOT")] == ["here."]
    with pytest.raises(DataError, match=r"which speaker.*CHI, MOT"):
        load_dataset(both)
    with pytest.raises(DataError, match=r"no speaker 'PAR'.*CHI, MOT"):
        load_dataset(both, speaker="PAR")
    one = write_chat(tmp_path / "one.cha", tiers[:1], participants="CHI Target_Child")
    assert [u.speaker for u in load_dataset(one)] == ["CHI"]


def test_a_speaker_known_from_its_id_only(tmp_path):
    write_audio(tmp_path / "session.wav")
    ids = "@ID:\teng|corpus|PAR|63;|male|||Participant|||\n"
    ids += "@ID:\teng|corpus|INV|||||Investigator|||\n"
    tiers = [f"*INV:\thello . {mark(0, 400)}"]
    path = write_chat(tmp_path / "a.cha", tiers, participants="", ids=ids)
    with pytest.raises(DataError, match="no utterances"):  # PAR is chosen and has none
        load_dataset(path)


def test_transcripts_in_a_splits_folder_are_of_that_split(tmp_path):
    for split in ("train", "test"):
        write_audio(tmp_path / split / "talk.wav")
        write_chat(tmp_path / split / "talk.cha", [f"*PAR:\thello . {mark(0, 400)}"], media="talk")
    assert sorted(u.split for u in load_dataset(tmp_path)) == ["test", "train"]


def test_a_transcript_without_speakers(tmp_path):
    write_audio(tmp_path / "session.wav")
    with pytest.raises(DataError, match=r"which speaker.*none"):
        load_dataset(write_chat(tmp_path / "a.cha", [], participants=""))


def test_missing_media_is_named(tmp_path):
    tiers = [f"*PAR:\thello . {mark(0, 400)}"]
    message = r"a\.cha: audio 'session' of its @Media header does not exist.*\.flac.*media/"
    with pytest.raises(DataError, match=message):
        load_dataset(write_chat(tmp_path / "a.cha", tiers))
    with pytest.raises(DataError, match="no @Media header; add '@Media:\ta, audio'"):
        load_dataset(write_chat(tmp_path / "a.cha", tiers, media=""))


@pytest.mark.parametrize(
    ("chat", "text"),
    [
        ("I want a cookie .", "I want a cookie."),
        ("well , you know ?", "well, you know?"),
        ("the [/] the dog ran .", "the the dog ran."),
        ("<I want> [//] I need it .", "I want I need it."),
        ("<the dog> [///] a cat [/-] no [/?] yes .", "the dog a cat no yes."),
        ("< <a b> [/] a b c> [//] d .", "a b a b c d."),
        ("so <we were> [>] there [<] .", "so we were there."),
        ("he goed [: went] [* m:+ed] home .", "he went home."),
        ("I gonna [: going to] sit .", "I going to sit."),
        ("the wɛk@u [: wet] [* p:n] [//] red hat .", "the wet red hat."),
        ("a bird [:: dog] [* s:r] barked .", "a bird barked."),
        (
            "a dog [* s:r] barked [?] [!] [=! laughs] [x 3] [% a comment] [+ exc] .",
            "a dog barked barked barked.",
        ),
        ("[- spa] hola .", "hola."),
        ("&-um I &+fr &~ga &=laughs:loudly friend &*INV:mhm .", "I friend."),
        ("&-uh , I , &-um , know .", "I, know."),
        ("I want +...", "I want"),
        ("did you +..?", "did you"),
        ("he said +/.", "he said"),
        ("he said +//.", "he said"),
        ('he said +"/.', "he said"),
        ('+" come here .', "come here."),
        ("+< yes !", "yes!"),
        ("++ and , then .", "and, then."),
        ("(be)cause runnin(g) .", "because running."),
        ("I (.) went (..) out (1.5) now (...) .", "I went out now."),
        ("b@l is gumma@c and Keks@s:deu .", "b is gumma and Keks."),
        ("0is he 0 here .", "he here."),
        ("ice+cream with Mary_Poppins .", "ice cream with Mary Poppins."),
        ("bana:na ↑yes‡ ⌈no⌉ .", "banana yes no."),
        ("isn't it „ good-bye .", "isn't it good-bye."),
        ("<that is> [x 2] it , no [x 3] .", "that is that is it, no no no."),
        ("[x 2] first <a [x 2] b> [x2] .", "first a a b a a b."),
        ('I know [e] <what [= it] he> [<2] said ["] [^c] .', "I know what he said."),
        ("⌈2 overlapped ⌉2 with ⌊3other⌋3 talk ⌈1 .", "overlapped with other talk."),
        ("⁇maybe⁇ ⁎creaky⁎ °soft° ◉loud◉ ∆fast∆ ∇slow∇ .", "maybe creaky soft loud fast slow."),
        ("▁low▁ ▔high▔ ☺smiled☺ ♋breathy♋ ∬whispered∬ .", "low high smiled breathy whispered."),
        ("∲sung∲ ∮sung∮ §clear§ ΫyawnedΫ .", "sung sung clear yawned."),
        (
            "∙hhh well hh pitch↻ reset⤇ fun⁑ny fuἩnny ∾tight .",
            "well pitch reset funny funny tight.",
        ),
        ("+≋ so I ≡ went ↑up ↓down ⇗", "so I went up down"),
        ("+≈ “come” he said ∞", "come he said"),
        ("↫b-b↫ball ≠and b̲a:d .", "ball and bad."),
        ('"so" -> no - [x 0] well [x 0] .', "so no well."),
        ("Ϋπνος dog$n café .", "Ϋπνος dog café."),
        ("<unclosed group .", "unclosed group."),
        ("stray> group .", "stray group."),
        ("[/] first .", "first."),
        ("xxx [//] a blorp@n [: x@n] [* n:uk] .", "xxx a xxx."),
        ("&=laughs .", "."),
        ("0 .", "."),
        ("0.", ""),
    ],
)
def test_chat_is_cleaned(chat, text):
    assert clean_chat(chat) == text


@pytest.mark.parametrize("word", ["xxx", "yyy", "www"])
def test_unintelligible_utterances_are_left_out_but_words_with_those_letters_are_not(
    tmp_path, word
):
    write_audio(tmp_path / "session.wav")
    tiers = [f"*PAR:\tI {word} . {mark(0, 200)}", f"*PAR:\ta{word} . {mark(200, 400)}"]
    assert [u.text for u in load_dataset(write_chat(tmp_path / "a.cha", tiers))] == [f"a{word}."]


# --- splits ---


@pytest.mark.parametrize(
    ("names", "split"),
    [
        (("train", "Training", "train-clean-100", " TRAIN "), "train"),
        (
            ("validation", "valid", "val", "dev", "Devel", "eval", "evaluation", "dev.other"),
            "validation",
        ),
        (("test", "Testing", "test_clean"), "test"),
    ],
)
def test_splits_by_their_usual_names_in_rows_and_folders(tmp_path, names, split):
    rows = [{"file_name": "a.wav", "text": "hello", "split": name} for name in names]
    rows += [{"file_name": f"data/{name.strip()}/x/a.wav", "text": "hello"} for name in names]
    found = load_dataset(write_folder(tmp_path, rows))
    assert {u.split for u in found} == {split} and len(found) == 2 * len(names)
    assert all(split_of(found, name) == found for name in names)


def test_a_row_s_split_beats_its_folder_s_and_an_inner_folder_s_beats_an_outer_one_s(tmp_path):
    rows = [
        {"file_name": "test/a.wav", "text": "hello", "split": "train"},
        {"file_name": "test/train/a.wav", "text": "a"},
    ]
    assert [u.split for u in load_dataset(write_folder(tmp_path, rows))] == ["train", "train"]


def test_folders_above_the_data_do_not_set_the_split(tmp_path):
    home = tmp_path / "test/manifests"
    elsewhere = tmp_path / "test/corpus"
    rows = []
    for folder in (home, elsewhere):
        for name in ("train/a.wav", "clips/b.wav"):
            audio = write_audio(folder / name)
            rows.append({"audio_filepath": str(audio), "text": "hello"})
    by_text = load_dataset(write_rows(home / "one.jsonl", rows[1:2]))[0].split
    found = load_dataset(write_rows(home / "set.jsonl", rows))
    assert [u.split for u in found] == ["train", by_text, "train", by_text]
    alone = load_dataset(write_rows(home / "alone.jsonl", rows[2:3]))
    assert alone[0].split == "train"  # the folder in which all recordings lie


def test_a_test_table_is_the_test_split_and_a_training_table_alone_is_divided(tmp_path):
    write_audio(tmp_path / "a.wav")
    rows = [{"audio_filepath": "a.wav", "text": f"sentence number {i}"} for i in range(50)]
    test = load_dataset(write_rows(tmp_path / "test_manifest.json", rows))
    train = load_dataset(write_rows(tmp_path / "train_manifest.json", rows))
    assert {u.split for u in test} == {"test"}
    assert {u.split for u in train} == {"train", "test"}


def test_what_is_left_out_is_counted_with_an_example(tmp_path):
    rows = []
    for i, speaker in enumerate(("bo", "ana", "ana")):
        row = {"file_name": f"{i}.wav", "text": "hello", "speaker": speaker, "split": "foo"}
        rows.append(row)
    report = DataReport()
    found = load_dataset(write_folder(tmp_path, rows), "ana", report)
    leave_out_unknown_splits(found, report)
    assert len(report.first(found, 1, "of the rows")) == 1
    assert report.document() == {
        "left_out": 4,
        "reasons": [
            {"reason": "by another speaker", "count": 1, "example": "0.wav by bo"},
            {
                "reason": "of split 'foo', none of train, validation, test",
                "count": 2,
                "example": "1.wav",
            },
            {"reason": "beyond the first 1 of the rows", "count": 1, "example": "2.wav"},
        ],
        "notes": [],
    }
    assert "left out 4: by another speaker (1, e.g. 0.wav by bo); of split 'foo'" in str(report)


def test_split_of_takes_one_split_or_names_those_that_there_are(tmp_path):
    audio = write_audio(tmp_path / "a.wav")
    utterances = [
        Utterance(audio, "a", "train"),
        Utterance(audio, "b", "train"),
        Utterance(audio, "c", "dev"),
    ]
    assert [u.text for u in split_of(utterances, "train")] == ["a", "b"]
    with pytest.raises(DataError, match=r"split 'test'.*dev \(1\), train \(2\)"):
        split_of(utterances, "test")
    with pytest.raises(DataError, match="none"):
        split_of([], "test")


def test_loading_a_data_set_needs_neither_torch_nor_pandas(run_python):
    code = (
        "import sys, tiny_align.align.data.datasets; print({'torch', 'pandas'} & set(sys.modules))"
    )
    done = run_python(code)
    assert (done.status, done.stdout.strip()) == (0, "set()"), done.stderr

"""align/datasets.py on small data sets written here, in every form, whole and broken."""

import json
import logging
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
import soundfile

from tiny_align.align.datasets import Utterance, clean_chat, load_dataset, split_of
from tiny_align.runtime.errors import AudioError, DataError

RATE = 16_000  # Hz


def write_audio(path, seconds=0.5, hz=440.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * hz * np.arange(round(seconds * RATE)) / RATE), RATE)
    return path


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def folder_of(tmp_path, rows):
    """An audiofolder with these rows and the audio they name."""
    for row in rows:
        write_audio(tmp_path / row["file_name"])
    write_rows(tmp_path / "metadata.jsonl", rows)
    return tmp_path


def mark(start_ms, end_ms):
    return f"\x15{start_ms}_{end_ms}\x15"


def write_chat(path, tiers, participants="PAR Participant, INV Investigator", media="session", ids=""):
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
    assert load_dataset(folder_of(tmp_path, rows)) == [
        Utterance(tmp_path / "a.wav", "Hello there.", "train", speaker="ana"),
        Utterance(tmp_path / "b.flac", "Good bye", "test"),
    ]
    assert load_dataset(str(tmp_path)) == load_dataset(tmp_path / "metadata.jsonl")


def test_a_folder_with_metadata_csv(tmp_path):
    write_audio(tmp_path / "clips" / "a.wav")
    text = '\ufefffile_name,transcription,split\r\nclips/a.wav,"Yes, ""now""",dev\r\n'
    (tmp_path / "metadata.csv").write_bytes(text.encode())
    assert load_dataset(tmp_path) == [Utterance(tmp_path / "clips/a.wav", 'Yes, "now"', "dev")]


@pytest.mark.parametrize("field", ["transcription", "text", "sentence"])
def test_names_of_the_text(tmp_path, field):
    assert load_dataset(folder_of(tmp_path, [{"file_name": "a.wav", field: "hello"}]))[0].text == "hello"


def test_duration_in_metadata_is_only_information(tmp_path):
    row = {"file_name": "a.wav", "text": "hello", "duration": 0.4, "offset": 0.1}
    assert load_dataset(folder_of(tmp_path, [row]))[0].end_s is None


def test_the_split_is_that_of_the_folder(tmp_path):
    rows = [{"file_name": f"{folder}/a.wav", "text": "hello"} for folder in ("train", "test")]
    rows.append({"file_name": "test/b.wav", "text": "hello", "split": "train"})
    assert [u.split for u in load_dataset(folder_of(tmp_path, rows))] == ["train", "test", "train"]


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


def test_texts_are_nfc_on_one_line_and_keep_their_case(tmp_path):
    row = {"file_name": "a.wav", "text": "  " + unicodedata.normalize("NFD", "Où est\nle Café ?") + " "}
    assert load_dataset(folder_of(tmp_path, [row]))[0].text == "Où est le Café ?"


def test_blank_lines_and_line_separators_are_no_rows(tmp_path):
    write_audio(tmp_path / "a.wav")
    row = json.dumps({"file_name": "a.wav", "text": "one\u2028two"}, ensure_ascii=False)
    (tmp_path / "metadata.jsonl").write_text(f"\n{row}\n\n", encoding="utf-8")
    assert [u.text for u in load_dataset(tmp_path)] == ["one two"]


def test_a_speaker_of_a_folder(tmp_path):
    rows = [{"file_name": "a.wav", "text": "hello", "speaker_id": 7}, {"file_name": "b.wav", "text": "bye"}]
    folder = folder_of(tmp_path, rows)
    assert [u.text for u in load_dataset(folder, speaker="7")] == ["hello"]
    with pytest.raises(DataError, match=r"nothing by speaker 'ana'.*\(none given\), 7"):
        load_dataset(folder, speaker="ana")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "hello"}, "line 2: no text in the field file_name; the row has text"),
        (
            {"file_name": "a.wav"},
            "line 2: no text in the field transcription or text or sentence; the row has file_name",
        ),
        ({"file_name": "a.wav", "text": " "}, "line 2: no text in the field transcription"),
        ({"file_name": "a.wav", "text": 7}, "line 2: no text in the field transcription"),
        ({"file_name": "absent.wav", "text": "hi"}, r"line 2: audio file .*absent\.wav does not exist"),
        ({"file_name": ".", "text": "hi"}, "line 2: audio file .* does not exist"),
        ([1, 2], "line 2: got a list; expected one JSON object per line"),
    ],
)
def test_bad_rows(tmp_path, row, message):
    write_audio(tmp_path / "a.wav")
    write_rows(tmp_path / "metadata.jsonl", [{"file_name": "a.wav", "text": "hello"}, row])
    with pytest.raises(DataError, match=rf"metadata\.jsonl, {message}"):
        load_dataset(tmp_path)


def test_bad_rows_of_csv(tmp_path):
    write_audio(tmp_path / "a.wav")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.wav,hello\na.wav\n")
    with pytest.raises(DataError, match=r"metadata\.csv, line 3: no text in the field transcription"):
        load_dataset(tmp_path)
    (tmp_path / "metadata.csv").write_text("a.wav,hello\na.wav,hello,more\n")  # no header
    with pytest.raises(DataError, match=r"metadata\.csv, line 2: no text in the field file_name"):
        load_dataset(tmp_path)
    (tmp_path / "metadata.csv").write_text(f"file_name,text\na.wav,{'x' * 200_000}\n")
    with pytest.raises(DataError, match=r"metadata\.csv, line 2: invalid CSV"):
        load_dataset(tmp_path)
    (tmp_path / "metadata.csv").write_text('file_name,text\na.wav,"hello\n')  # a quote left open
    with pytest.raises(DataError, match=r"metadata\.csv, line \d: invalid CSV"):
        load_dataset(tmp_path)


def test_invalid_json(tmp_path):
    (tmp_path / "metadata.jsonl").write_text('\n{"file_name": \n')
    with pytest.raises(DataError, match=r"metadata\.jsonl, line 2: invalid JSON"):
        load_dataset(tmp_path)


def test_not_utf8(tmp_path):
    (tmp_path / "metadata.csv").write_bytes("file_name,text\na.wav,café\n".encode("latin-1"))
    with pytest.raises(DataError, match="save it as UTF-8"):
        load_dataset(tmp_path)


def test_paths_that_are_no_data_set(tmp_path):
    with pytest.raises(DataError, match=r"no such file or folder; expected .*metadata\.jsonl.*manifest.*\.cha"):
        load_dataset(tmp_path / "absent")
    with pytest.raises(DataError, match=r"a folder of no known form; expected .*metadata\.jsonl.*manifest.*\.cha"):
        load_dataset(tmp_path)
    with pytest.raises(DataError, match="a file of no known form"):
        load_dataset(write_audio(tmp_path / "a.wav"))


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_no_utterances(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(DataError, match="no utterances"):
        load_dataset(tmp_path)


# --- (b) a manifest ---


def test_a_manifest(tmp_path):
    for name in ("clips/a.wav", "elsewhere/b.wav"):
        write_audio(tmp_path / name)
    rows = [
        {"audio_filepath": "clips/a.wav", "text": "one", "split": "test", "speaker": "ana"},
        {"audio_filepath": "clips/a.wav", "text": "two", "split": "train", "offset": 0.1, "duration": 0.25},
        {"audio_filepath": str(tmp_path / "elsewhere/b.wav"), "text": "three", "split": "train", "duration": 0.5},
        {"audio_filepath": "clips/a.wav", "text": "four", "split": "train", "offset": 0.1, "duration": None},
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
        ({"text": None}, "no text in the field text"),
        ({"audio_filepath": "b.wav"}, r"audio file .*b\.wav does not exist"),
        ({"offset": -1}, "offset is -1; expected seconds"),
        ({"offset": "1.0"}, "offset is '1.0'; expected seconds"),
        ({"duration": True}, "duration is True; expected seconds"),
        ({"duration": float("nan")}, "duration is nan; expected seconds"),
        ({"duration": 0}, "duration is 0; expected seconds above 0"),
    ],
)
def test_bad_rows_of_a_manifest(tmp_path, fields, message):
    write_audio(tmp_path / "a.wav")
    path = write_rows(tmp_path / "set.jsonl", [{"audio_filepath": "a.wav", "text": "one"} | fields])
    with pytest.raises(DataError, match=rf"set\.jsonl, line 1: {message}"):
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
    for reason in ("skipped 4 utterances", "2 without time marks", "1 unintelligible", "1 without words"):
        assert reason in caplog.text


def test_nothing_skipped_nothing_logged(tmp_path, caplog):
    write_audio(tmp_path / "session.wav")
    load_dataset(write_chat(tmp_path / "a.cha", [f"*PAR:\thello . {mark(0, 500)}"]))
    assert not caplog.records


def test_a_folder_of_transcripts(tmp_path):
    write_audio(tmp_path / "one.wav")
    write_audio(tmp_path / "media" / "two.FLAC")
    write_chat(tmp_path / "one.cha", [f"*PAR:\tfirst . {mark(0, 400)}"], media="one")
    write_chat(tmp_path / "two.cha", [f"*PAR:\tsecond . {mark(0, 400)}"], media="two")
    assert [(u.text, u.audio.name) for u in load_dataset(tmp_path)] == [("first.", "one.wav"), ("second.", "two.FLAC")]


def test_several_marks_span_the_utterance_and_old_ones_are_read(tmp_path):
    write_audio(tmp_path / "session.mp3", seconds=3.0)
    old = '\x15%snd:"session"_2000_2500\x15'
    tiers = [f"*PAR:\tone {mark(0, 400)} two {mark(500, 900)} .", f"*PAR:\tthree . {old}"]
    utterances = load_dataset(write_chat(tmp_path / "a.cha", tiers, media="session.mp3"))
    assert [(u.text, u.start_s, u.end_s) for u in utterances] == [("one two.", 0.0, 0.9), ("three.", 2.0, 2.5)]


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
    ids = "@ID:\teng|corpus|PAR|63;|male|||Participant|||\n@ID:\teng|corpus|INV|||||Investigator|||\n"
    path = write_chat(tmp_path / "a.cha", [f"*INV:\thello . {mark(0, 400)}"], participants="", ids=ids)
    with pytest.raises(DataError, match="no utterances"):  # PAR is the person, and said nothing
        load_dataset(path)


def test_a_transcript_without_speakers(tmp_path):
    write_audio(tmp_path / "session.wav")
    with pytest.raises(DataError, match=r"which speaker.*none"):
        load_dataset(write_chat(tmp_path / "a.cha", [], participants=""))


def test_missing_media(tmp_path):
    tiers = [f"*PAR:\thello . {mark(0, 400)}"]
    with pytest.raises(DataError, match=r"a\.cha: audio 'session' of its @Media header does not exist.*\.flac.*media/"):
        load_dataset(write_chat(tmp_path / "a.cha", tiers))
    with pytest.raises(DataError, match="no @Media header; add '@Media:\ta, audio'"):
        load_dataset(write_chat(tmp_path / "a.cha", tiers, media=""))


@pytest.mark.parametrize(
    ("chat", "text"),
    [
        ("I want a cookie .", "I want a cookie."),
        ("well , you know ?", "well, you know?"),
        ("the [/] the dog ran .", "the dog ran."),
        ("<I want> [//] I need it .", "I need it."),
        ("<the dog> [///] a cat [/-] no [/?] yes .", "a yes."),
        ("< <a b> [/] a b c> [//] d .", "d."),
        ("so <we were> [>] there [<] .", "so we were there."),
        ("he goed [: went] [* m:+ed] home .", "he went home."),
        ("I gonna [: going to] sit .", "I going to sit."),
        ("the wɛk@u [: wet] [* p:n] [//] red hat .", "the red hat."),
        ("a bird [:: dog] [* s:r] barked .", "a dog barked."),
        ("a dog [* s:r] barked [?] [!] [=! laughs] [x 3] [% a comment] [+ exc] .", "a dog barked."),
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
        ("<unclosed group .", "unclosed group."),
        ("stray> group .", "stray group."),
        ("[/] first .", "first."),
        ("xxx [//] a blorp@n [: x@n] [* n:uk] .", "a xxx."),
        ("&=laughs .", "."),
        ("0 .", "."),
        ("0.", ""),
    ],
)
def test_chat_is_cleaned(chat, text):
    assert clean_chat(chat) == text


@pytest.mark.parametrize("word", ["xxx", "yyy", "www"])
def test_unintelligible_utterances_are_skipped_but_words_with_those_letters_are_not(tmp_path, word):
    write_audio(tmp_path / "session.wav")
    tiers = [f"*PAR:\tI {word} . {mark(0, 200)}", f"*PAR:\ta{word} . {mark(200, 400)}"]
    assert [u.text for u in load_dataset(write_chat(tmp_path / "a.cha", tiers))] == [f"a{word}."]


# --- splits ---


def test_split_of(tmp_path):
    audio = write_audio(tmp_path / "a.wav")
    utterances = [Utterance(audio, text, split) for text, split in (("a", "train"), ("b", "train"), ("c", "dev"))]
    assert [u.text for u in split_of(utterances, "train")] == ["a", "b"]
    with pytest.raises(DataError, match=r"split 'test'.*dev \(1\), train \(2\)"):
        split_of(utterances, "test")
    with pytest.raises(DataError, match="none"):
        split_of([], "test")


def test_no_torch():
    code = "import sys, tiny_align.align.datasets; sys.exit('torch' in sys.modules or 'pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

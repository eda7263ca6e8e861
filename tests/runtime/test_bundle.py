"""runtime/bundle/: a whole bundle opens; a damaged one, or one for another LLM, is refused."""

import dataclasses
import json
import shutil
from datetime import datetime

import numpy as np
import pytest

from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.bundle.manifest import MANIFEST, PromptSpec
from tiny_align.runtime.bundle.users import GENERAL, USER_RECORD, check_user
from tiny_align.runtime.errors import BundleError, UserError

GRAPHS = ("encoder", "projector", "llm")


@pytest.fixture
def user(bundle_copy, make_user):
    """Ana, in the bundle's own users folder."""
    return make_user(Bundle.open(bundle_copy), bundle_copy / "users/ana")


def cut_in_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


# --- bundles ---


def test_the_shipped_bundle_opens(bundle_path):
    manifest = Bundle.open(bundle_path).manifest
    assert set(GRAPHS) <= set(manifest.graphs)
    assert manifest.files["token_embeddings.npy"] == manifest.embeddings_sha256


def test_a_manifest_equals_the_one_read_from_its_json(bundle_path):
    manifest = Bundle.open(bundle_path, verify=False).manifest
    assert type(manifest).from_json(json.loads(json.dumps(manifest.to_json()))) == manifest


@pytest.mark.parametrize(
    "name", ["encoder.onnx.data", "llm.onnx", "tokenizer.json", "token_embeddings.npy"]
)
def test_a_changed_byte_is_refused(bundle_copy, name):
    flip_a_byte(bundle_copy / name)
    with pytest.raises(
        BundleError, match=rf"{name} has changed: its SHA-256 is not the manifest's"
    ):
        Bundle.open(bundle_copy)
    Bundle.open(bundle_copy, verify=False)  # the switch that turns the check off


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("verify", [True, False])
def test_a_missing_graph_is_named(bundle_copy, name, verify):
    (bundle_copy / f"{name}.onnx").unlink()
    with pytest.raises(BundleError, match=rf"lacks {name}\.onnx, which its manifest lists"):
        Bundle.open(bundle_copy, verify=verify)


def test_a_graph_the_manifest_does_not_have_is_named(bundle_copy, edit_json):
    edit_json(bundle_copy / MANIFEST, lambda m: m["graphs"].pop("llm"))
    with pytest.raises(BundleError, match=r"no graph 'llm'.*encoder, projector"):
        Bundle.open(bundle_copy).graph("llm")


@pytest.mark.parametrize(
    "make", [lambda p: None, lambda p: p.mkdir(), lambda p: p.write_text("a file")]
)
def test_a_path_without_a_manifest_is_refused(tmp_path, make):
    make(tmp_path / "thing")
    with pytest.raises(BundleError, match=r"thing is not a bundle: it has no manifest\.json"):
        Bundle.open(tmp_path / "thing")


def test_another_schema_is_refused(bundle_copy, edit_json):
    edit_json(bundle_copy / MANIFEST, lambda m: m.update(schema=99))
    with pytest.raises(
        BundleError, match=r"has schema 99, this version reads schema 1: export the bundle again"
    ):
        Bundle.open(bundle_copy)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"7", b"null", b"{}", b'{"schema": 1', b"\xff\xfe\x00"]
)
def test_a_damaged_manifest_is_refused(bundle_copy, content):
    (bundle_copy / MANIFEST).write_bytes(content)
    with pytest.raises(
        BundleError, match=r"manifest\.json is not a manifest \(.*export the bundle again"
    ):
        Bundle.open(bundle_copy)


CHANGES = {
    "unknown field": lambda m: m.update(surprise=1),
    "unknown field of the LLM": lambda m: m["llm"].update(surprise=1),
    "unknown field of a graph": lambda m: m["graphs"]["llm"].update(surprise=1),
    "missing field": lambda m: m.pop("prompt"),
    "missing field of the front end": lambda m: m["front_end"].update(n_mel=80),
    "missing dimension": lambda m: m["graphs"]["llm"]["inputs"][0].pop("shape"),
    "null instead of graphs": lambda m: m.update(graphs=None),
    "null instead of files": lambda m: m.update(files=None),
    "list instead of files": lambda m: m.update(files=["encoder.onnx"]),
    "number instead of dims": lambda m: m.update(dims=3),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_unknown_and_missing_fields_are_refused(bundle_copy, edit_json, change):
    edit_json(bundle_copy / MANIFEST, change)
    with pytest.raises(BundleError, match=r"lacks or misnames a field \(.*export the bundle again"):
        Bundle.open(bundle_copy)


SIZES = {
    "a negative vocabulary": lambda m: m["llm"].update(vocabulary=-1),
    "no layers": lambda m: m["llm"].update(n_layers=0),
    "a huge vocabulary": lambda m: m["llm"].update(vocabulary=10**18),
    "a float for a count": lambda m: m["llm"].update(hidden_size=192.0),
    "a text for a count": lambda m: m["llm"].update(max_context="256"),
    "true for a count": lambda m: m["llm"].update(n_kv_heads=True),
    "NaN seconds": lambda m: m["encoder"].update(frame_s=float("nan")),
    "no seconds": lambda m: m["encoder"].update(frame_s=0),
    "an infinite scale": lambda m: m["llm"].update(embedding_scale=float("inf")),
    "a negative token": lambda m: m["llm"].update(end_tokens=[-2]),
    "a rate of 0": lambda m: m["front_end"].update(sample_rate=0),
    "a text for a share": lambda m: m["front_end"].update(speech_share="much"),
    "a negative offset": lambda m: m["projector_weights"][0].update(offset=-4),
    "a shape of texts": lambda m: m["projector_weights"][0].update(shape=["a"]),
    "dims of two": lambda m: m["dims"].update({next(iter(m["dims"])): [1, 2]}),
    "a negative dimension": lambda m: m["graphs"]["llm"]["inputs"][0].update(shape=[1, -1, 192]),
    "a dimension without values": lambda m: m["graphs"]["encoder"]["inputs"][0].update(
        shape=[1, "steps", 80]
    ),
    "a type that there is not": lambda m: m["graphs"]["encoder"]["inputs"][0].update(
        dtype="float33"
    ),
    "no inputs": lambda m: m["graphs"]["encoder"].update(inputs=[]),
    "windows of nothing": lambda m: m["windows"].update(vector_samples=0),
    "margins beyond a window": lambda m: m["windows"].update(margin=10**6),
    "a size of the projector": lambda m: m["projector"].update(hidden_size=2**40),
    "another readout": lambda m: m["readout"].update(kind="guess"),
    "a number for a name": lambda m: m.update(name=7),
    "a number for a hash": lambda m: m["files"].update({"encoder.onnx": 7}),
    "a number for a text": lambda m: m["prompt"].update(after=7),
}


@pytest.mark.parametrize("change", SIZES.values(), ids=SIZES)
def test_impossible_sizes_are_refused(bundle_copy, edit_json, change):
    edit_json(bundle_copy / MANIFEST, change)
    with pytest.raises(
        BundleError,
        match=r"manifest\.json(: .* expected | lacks or misnames ).*export the bundle again",
    ):
        Bundle.open(bundle_copy)


def test_weights_beyond_the_data_file_are_refused(bundle_copy, edit_json):
    edit_json(bundle_copy / MANIFEST, lambda m: m["projector_weights"][0].update(offset=2**35))
    with pytest.raises(BundleError, match=r"projector\.onnx\.data has no room for the weights"):
        Bundle.open(bundle_copy)


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"PK\x03\x04", b"garbage" * 99])
@pytest.mark.parametrize("name", ["token_embeddings.npy", "speech_tokens.npy", "tokenizer.json"])
def test_a_file_of_another_kind_is_refused(bundle_copy, name, content):
    """Although its hash fits: it was damaged before the manifest was written."""
    (bundle_copy / name).write_bytes(content)
    bundle = Bundle(bundle_copy, Bundle.open(bundle_copy, verify=False).manifest)
    load = {
        "token_embeddings.npy": bundle.load_embeddings,
        "speech_tokens.npy": bundle.speech_tokens,
        "tokenizer.json": bundle.load_tokenizer,
    }
    with pytest.raises(BundleError, match=rf"{name} (is damaged|cannot be read) \("):
        load[name]()


@pytest.mark.parametrize("tokens", [[[1, 2]], [-1, 3], [5, 10**6], [0.5]])
def test_speech_tokens_of_another_llm_are_refused(bundle_copy, tokens):
    np.save(bundle_copy / "speech_tokens.npy", np.array(tokens))
    with pytest.raises(
        BundleError, match="is no list of tokens of this LLM, whole numbers from 0 to 799"
    ):
        Bundle.open(bundle_copy, verify=False).speech_tokens()


def test_an_embedding_table_of_another_width_is_refused(bundle_copy):
    np.save(bundle_copy / "token_embeddings.npy", np.zeros((800, 64), np.float16))
    with pytest.raises(
        BundleError, match=r"is float16 \[800, 64\], expected floats of 192 columns"
    ):
        Bundle.open(bundle_copy, verify=False).load_embeddings()


OUTSIDE = [
    "../secret",
    "/etc/passwd",
    "a/../../secret",
    "..",
    "..\\secret",
    "C:\\secret",
    "C:secret",
    "",
    ".",
    None,
    7,
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_graph_outside_the_bundle_is_refused(bundle_copy, edit_json, name):
    edit_json(bundle_copy / MANIFEST, lambda m: m["graphs"]["encoder"].update(file=name))
    with pytest.raises(BundleError, match=r"names the file .*: expected .* inside the bundle"):
        Bundle.open(bundle_copy)


@pytest.mark.parametrize("name", [n for n in OUTSIDE if isinstance(n, str)])
def test_a_file_outside_the_bundle_is_refused(bundle_copy, edit_json, name):
    (bundle_copy.parent / "secret").write_text("not the bundle's")
    edit_json(bundle_copy / MANIFEST, lambda m: m["files"].update({name: "0" * 64}))
    with pytest.raises(BundleError, match=r"names the file .*: expected .* inside the bundle"):
        Bundle.open(bundle_copy, verify=False)


def test_a_graph_may_lie_in_a_folder_of_the_bundle(bundle_copy, edit_json):
    (bundle_copy / "graphs").mkdir()
    (bundle_copy / "encoder.onnx").rename(bundle_copy / "graphs/encoder.onnx")

    def move(manifest):
        manifest["graphs"]["encoder"]["file"] = "graphs/encoder.onnx"
        manifest["files"]["graphs/encoder.onnx"] = manifest["files"].pop("encoder.onnx")

    edit_json(bundle_copy / MANIFEST, move)
    assert Bundle.open(bundle_copy).graph("encoder") == bundle_copy / "graphs/encoder.onnx"


# --- users ---


@pytest.mark.parametrize("name", [None, GENERAL])
def test_the_general_projector_is_the_bundles(bundle_path, name):
    assert Bundle.open(bundle_path).projector(name) == bundle_path / "projector.onnx"


def test_a_users_projector_is_the_one_in_the_users_folder(bundle_copy, user, tmp_path, make_user):
    bundle = Bundle.open(bundle_copy)
    assert bundle.projector("ana") == user / "projector.onnx"
    elsewhere = make_user(bundle, tmp_path / "others/ben")
    assert bundle.projector("ben", tmp_path / "others") == elsewhere / "projector.onnx"


def test_a_user_projector_has_its_files_and_its_speech_tokens(bundle_copy, user):
    bundle = Bundle.open(bundle_copy)
    ana = bundle.user_projector("ana")
    assert (ana.name, ana.folder, ana.graph) == ("ana", user, user / "projector.onnx")
    np.testing.assert_array_equal(ana.speech_tokens, bundle.speech_tokens(ana.graph))

    general = bundle.user_projector()
    assert general == bundle.user_projector(GENERAL) != ana
    assert (general.name, general.folder) == (None, bundle_copy)
    assert general.graph == bundle.projector()


def test_user_projectors_are_equal_until_a_file_changes(bundle_copy, user, make_user):
    bundle = Bundle.open(bundle_copy)
    before = bundle.user_projector("ana")
    assert before == bundle.user_projector("ana")
    shutil.rmtree(user)
    make_user(bundle, user, shift=-0.2)
    assert before != bundle.user_projector("ana")


def test_a_bundle_opens_with_a_damaged_user(bundle_copy, user):
    cut_in_half(user / "projector.onnx.data")
    Bundle.open(bundle_copy)


def test_an_unknown_user_is_refused_with_the_known_ones(bundle_copy, user):
    with pytest.raises(
        UserError,
        match=r"no user 'ben' in .*users \(known: ana\): train one with `tiny-align align",
    ):
        Bundle.open(bundle_copy).projector("ben")
    assert not (bundle_copy / "users/ben").exists()


def test_without_a_users_folder_no_user_is_known(bundle_copy):
    with pytest.raises(UserError, match=r"no user 'ana' .*\(known: none\)"):
        Bundle.open(bundle_copy).projector("ana")


@pytest.mark.parametrize(
    "name",
    ["../x", "..", ".", "", "a/b", "a\\b", "/etc", "-f", ".hidden", "a b", "a\n", "é", "x" * 65],
)
def test_an_invalid_user_name_is_refused(bundle_path, name):
    with pytest.raises(UserError, match="is no user name: use letters, digits"):
        Bundle.open(bundle_path, verify=False).projector(name)


def test_general_is_refused_as_a_user_name(bundle_path):
    with pytest.raises(UserError, match="'general' is the bundle's own projector"):
        Bundle.open(bundle_path, verify=False).user_folder(GENERAL)


@pytest.mark.parametrize(
    ("field", "part"), [("embeddings_sha256", "LLM"), ("encoder_key", "encoder")]
)
def test_a_projector_for_another_bundle_is_refused(bundle_copy, user, edit_json, field, part):
    edit_json(user / USER_RECORD, lambda r: r.update({field: "0" * 64}))
    with pytest.raises(
        UserError, match=rf"'ana' was trained for another {part} \({field} 0{{12}}, this"
    ):
        Bundle.open(bundle_copy).projector("ana")


@pytest.mark.parametrize(
    "damage", [cut_in_half, flip_a_byte, lambda p: p.unlink()], ids=["cut", "changed", "gone"]
)
@pytest.mark.parametrize("name", ["projector.onnx", "projector.onnx.data"])
def test_a_damaged_projector_is_refused(bundle_copy, user, name, damage):
    damage(user / name)
    with pytest.raises(
        UserError, match=rf"ana/{name} is missing or has changed: train 'ana' again"
    ):
        Bundle.open(bundle_copy).projector("ana")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"{}", b"\xff", b'{"files": {}}'])
def test_a_damaged_record_is_refused(bundle_copy, user, content):
    (user / USER_RECORD).write_bytes(content)
    with pytest.raises(UserError, match=r"user\.json is damaged \(.*: train 'ana' again"):
        Bundle.open(bundle_copy).projector("ana")


RECORDS = {
    "no files": lambda r: r.update(files={}),
    "null files": lambda r: r.update(files=None),
    "a list of files": lambda r: r.update(files=["projector.onnx"]),
    "a number for a hash": lambda r: r.update(embeddings_sha256=7),
}


@pytest.mark.parametrize("change", RECORDS.values(), ids=RECORDS)
def test_a_record_without_hashes_is_refused(bundle_copy, user, edit_json, change):
    edit_json(user / USER_RECORD, change)
    with pytest.raises(UserError, match=r"train ('ana'|it) again"):
        check_user(user, Bundle.open(bundle_copy).manifest)


# --- the day in the prompt ---


def test_a_prompt_without_dates_is_the_same_on_every_day(bundle_copy, edit_json):
    """Manifests of older versions lack the field."""
    edit_json(bundle_copy / MANIFEST, lambda manifest: manifest["prompt"].pop("dates"))
    prompt = Bundle.open(bundle_copy, verify=False).manifest.prompt
    assert prompt.dates == {} and prompt.on(datetime(2031, 5, 9)) is prompt


def test_the_day_replaces_its_marks_in_every_piece_of_the_template():
    dates = {"DATE-0-goes-HERE": "%d %b %Y", "DATE-1-goes-HERE": "%A"}
    prompt = PromptSpec(
        "It is DATE-0-goes-HERE.", "|", "DATE-1-goes-HERE", "DATE-0-goes-HERE", "", "DATE-1", dates
    )
    today = prompt.on(datetime(2031, 5, 9))
    assert (today.before, today.between, today.after) == ("It is 09 May 2031.", "|", "Friday")
    assert (today.instruction, today.next, today.dates) == ("DATE-0-goes-HERE", "DATE-1", {})
    assert PromptSpec(**dataclasses.asdict(prompt)) == prompt  # as a manifest keeps it


def test_without_an_instruction_the_prompt_may_begin_otherwise():
    prompt = PromptSpec("<system>", "<user>", "<end>", "Answer.", "Repeat.")
    assert prompt.lead(" Answer. ") == "<system>Answer.<user>"
    assert prompt.lead("") == "<system><user>"
    own = dataclasses.replace(prompt, uninstructed="<system>I am D.<user>", dates={"D": "%A"}).on(
        datetime(2031, 5, 9)
    )
    assert own.lead(" ") == "<system>I am Friday.<user>"
    assert own.lead("Answer.") == "<system>Answer.<user>"

"""The tools: lists, curves, export. pytest, from the repository's root, collects this file, too."""

import json
import sys
from pathlib import Path

import pytest
import torch

import cmaev
import finetune
import pretrain
from tools import curves, export, lists

pytestmark = pytest.mark.filterwarnings("ignore:Unable to enable fault handler")  # pytest has taken stderr


@pytest.fixture
def run(monkeypatch):
    """A tool's main in this process."""
    def run_tool(tool, *arguments):
        monkeypatch.setattr(sys, "argv", [tool.__name__, *map(str, arguments)])
        cmaev.run_script(tool.main)
    return run_tool


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_lists_of_kinetics(tmp_path, run, capsys):
    """Numbered over all files, in alphabetical order; names in both layouts; missing videos are counted."""
    root = touch(tmp_path / "videos", "abseiling a rope/-a_b1234567_000010_000020.mp4", "xyz.mkv", "x.part")
    head = "label,youtube_id,time_start,time_end,split\n"
    for name, text in {
            "train": head + '"zumba, slow",xyz,3,13,train\nabseiling,gone,1,11,train\n',
            "val": head + "abseiling,-a_b1234567,10,20,val\n",
            "test": "youtube_id,time_start,time_end,split\nxyz,3,13,test\n", "other": "path label\n"}.items():
        (tmp_path / f"{name}.csv").write_text(text)
    train, val, test, other = (tmp_path / f"{name}.csv" for name in ("train", "val", "test", "other"))
    run(lists, train, val, test, "--videos", root, "--out", tmp_path / "out")
    output = capsys.readouterr().out
    assert "train.txt: 1 videos; 1 entries of" in output and "gone_000001_000011" in output
    for name, video in {"train": ("xyz.mkv", 1), "test": ("xyz.mkv", None),
                        "val": ("abseiling a rope/-a_b1234567_000010_000020.mp4", 0)}.items():
        assert cmaev.read_list(tmp_path / "out" / f"{name}.txt") == [(f"{root}/{video[0]}", video[1])]
    assert (tmp_path / "out" / "names.txt").read_text() == "abseiling\nzumba, slow\n"
    with pytest.raises(SystemExit, match="^error: .*other.csv is not a Kinetics CSV.*$"):
        run(lists, other, "--videos", root, "--out", tmp_path / "out")
    with pytest.raises(SystemExit, match="^error: .* has no video of .*train.csv.*$"):
        run(lists, train, "--videos", tmp_path / "out", "--out", tmp_path)


def test_lists_of_something_something(tmp_path, run):
    root, labels = touch(tmp_path / "videos", "1.webm", "22.webm"), tmp_path / "labels.json"
    rows = [{"id": "1", "label": "moving a pen", "template": "Moving [something] up"},
            {"id": "22", "label": "x", "template": "Dropping [something]", "placeholders": ["x"]},
            {"id": "3", "label": "x", "template": "Dropping [something]", "placeholders": ["x"]}]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    labels.write_text(json.dumps({"Moving something up": "0", "Dropping something": "1"}))
    command = [lists, tmp_path / "train.json", "--videos", root, "--out", tmp_path / "out", "--labels", labels]
    run(*command)
    assert cmaev.read_list(tmp_path / "out" / "train.txt") == [(f"{root}/1.webm", 0), (f"{root}/22.webm", 1)]
    assert (tmp_path / "out" / "names.txt").read_text() == "Moving something up\nDropping something\n"
    labels.write_text(json.dumps({"Moving something up": "0"}))
    with pytest.raises(SystemExit, match=f"^error: {labels} has no 'Dropping something'$"):
        run(*command)


def test_curves_of_runs(tmp_path, monkeypatch, run):
    """One colour per run, also in panels that only one of them has."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.chdir(touch(tmp_path, "a/log.jsonl", "b/log.jsonl", "c/nothing"))
    for name, values in {"a": pretrain.METRICS, "b": ["loss", "val_top1"]}.items():
        lines = [{"step": i, "epoch": i / 2, **dict.fromkeys(values, 1 / i)} for i in (1, 2, 3)]
        Path(name, "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run(curves, "a", "b")
    axes = pyplot.gcf().axes
    drawn = {ax.get_title(): {(line.get_label(), line.get_color()) for line in ax.lines} for ax in axes}
    assert len(drawn) == 5 and drawn["loss"] == {("a", "C0"), ("b", "C1")}
    assert drawn["InfoNCE"] == {("a", "C0")} and drawn["top-1 of one view, per cent"] == {("b", "C1")}
    assert list(axes[0].lines[0].get_xydata()[1]) == [1, 0.5] and Path("curves.png").stat().st_size
    with pytest.raises(SystemExit, match="c holds no log"):
        run(curves, "a", "c")


@pytest.fixture
def models():
    """A CMAEV and a Classifier whose weights are all random."""
    torch.manual_seed(0)
    cmaev.ENCODERS["vit_test"] = cmaev.VisionTransformer, dict(width=64, depth=2, heads=2)
    geometry = dict(frames=4, size=32, tubelet=2, patch=8)
    pretrained = cmaev.CMAEV("vit_test", contrast_weight=0.0, **geometry)
    tuned = finetune.Classifier(cmaev.build_encoder("vit_test", **geometry), ["left", "right", "up"])
    for p in [*pretrained.parameters(), *tuned.parameters()]:
        p.data += 0.1 * torch.randn_like(p)
    return pretrained, tuned.eval()


def test_hugging_faces_layout_is_read_back(tmp_path, models):
    model, tuned = models
    export.save_hugging_face(tmp_path / "base", model.encoder, model.decoder)
    encoder = cmaev.load_encoder(tmp_path / "base")
    decoder = cmaev.PixelDecoder(encoder)
    cmaev.load_encoder(tmp_path / "base", encoder, decoder)
    head = export.head_state(tuned)
    export.save_hugging_face(tmp_path / "tuned", tuned.encoder, head=head, names=tuned.names)
    state, _ = cmaev.read_weights(tmp_path / "tuned")
    expected = {name.removeprefix("encoder."): value for name, value in tuned.state_dict().items()}
    for read, written in ((encoder.state_dict(), model.encoder.state_dict()), (state, expected),
                          (decoder.state_dict(), model.decoder.state_dict())):
        assert read.keys() == written.keys() and all(torch.equal(read[name], written[name]) for name in written)
    foreign = torch.load(tmp_path / "base" / "pytorch_model.bin")
    for stem, part in (("videomae.encoder.layer.1", model.encoder), ("decoder.decoder_layers.1", model.decoder)):
        q, k, v = part.blocks[1].attn.qkv.bias.chunk(3)
        biases = {"q_bias": q, "v_bias": v, "query.bias": q, "key.bias": k, "value.bias": v}
        assert all(torch.equal(foreign[f"{stem}.attention.attention.{name}"], biases[name]) for name in biases)
    config = json.loads((tmp_path / "tuned" / "config.json").read_text())
    assert config["id2label"] == {"0": "left", "1": "right", "2": "up"} and config["image_size"] == 32
    with pytest.raises(cmaev.CMAEVError, match="has no ConvViT"):
        export.save_hugging_face(tmp_path / "convvit", cmaev.build_encoder("convvit_tiny", frames=4, size=32))


def test_hugging_face_gives_the_same_tokens_loss_and_logits(tmp_path, models):
    """What transformers writes loads here, too."""
    transformers = pytest.importorskip("transformers")
    (model, tuned), online, mask = models, torch.randn(6, 3, 4, 32, 32), cmaev.tube_mask(6, (2, 4, 4), 0.75)
    frames = online.transpose(1, 2)

    def same(what, a, b):
        print(f"{what}: largest difference {(a - b).abs().max():.1e}, largest value {b.abs().max():.2f}")
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    load = lambda kind: getattr(transformers, kind).from_pretrained(tmp_path / kind).eval()
    export.save_hugging_face(tmp_path / "VideoMAEModel", model.encoder)
    export.save_hugging_face(tmp_path / "VideoMAEForPreTraining", model.encoder, model.decoder)
    export.save_hugging_face(tmp_path / "VideoMAEForVideoClassification", tuned.encoder,
                             head=export.head_state(tuned), names=tuned.names)
    with torch.no_grad():
        same("tokens", load("VideoMAEModel")(frames).last_hidden_state, model.encoder(online))
        same("loss", load("VideoMAEForPreTraining")(frames, bool_masked_pos=mask).loss,
             model(online, None, mask)["loss"])
        theirs = load("VideoMAEForVideoClassification")
        same("logits", theirs(frames).logits, tuned(online))
        assert theirs.config.id2label == dict(enumerate(tuned.names))
        for kind in ("VideoMAEForPreTraining", "VideoMAEModel"):
            load(kind).save_pretrained(tmp_path / "again")
            same(f"{kind} read back", cmaev.load_encoder(tmp_path / "again")(online), model.encoder(online))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "VideoMAEModel")
    clip = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    same("processor", processor(list(clip), return_tensors="pt")["pixel_values"],
         cmaev.normalize(clip[None]).transpose(1, 2))

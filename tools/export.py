"""Writes a run in Hugging Face's layout, a folder for from_pretrained of transformers.

    python -m tools.export runs/finetune-demo folder [--best]     for VideoMAEForVideoClassification
    python -m tools.export runs/pretrain-demo folder              for VideoMAEForPreTraining
"""

import json
from pathlib import Path

import cmaev
import finetune

import torch


def hugging_face_names(state, prefix=""):
    """Renames a state dict's weights to Hugging Face's names, the opposite of cmaev.convert_keys.

    Biases are written twice: transformers 5.8 to 5.16 read query.bias and value.bias alone, 4 to 5.4 q_bias
    and v_bias alone.
    """
    new = {}
    for name, value in (state | cmaev.split_biases(state)).items():
        name = "^" + name
        for ours, theirs in cmaev.HUGGING_FACE.items():
            name = name.replace(ours, theirs)
        name = prefix + name.removeprefix("^")
        if ".qkv." in name:
            for part, x in zip(("query", "key", "value"), value.chunk(3)):
                new[name.replace("qkv", part)] = x
        else:
            new[name] = value.view(1, 1, -1) if name == "mask_token" else value
    return new


def head_state(model):
    """A Classifier's state dict without the encoder."""
    return {name: value for name, value in model.state_dict().items() if not name.startswith("encoder.")}


def save_hugging_face(folder, encoder, decoder=None, head=None, names=()):
    """Writes a ViT in Hugging Face's layout: a folder for VideoMAEModel.

    With a decoder: for VideoMAEForPreTraining. With `head`, the state dict of a classifier's fc_norm and head,
    and class names: for VideoMAEForVideoClassification. Raises cmaev.CMAEVError for a ConvViT and for oblong
    clips.
    """
    if not isinstance(encoder, cmaev.VisionTransformer):
        raise cmaev.CMAEVError("Hugging Face has no ConvViT: only a ViT can be written in its layout")
    (frames, height, width), (tubelet, patch, _) = encoder.grid, encoder.cube
    if height != width:
        raise cmaev.CMAEVError(f"Hugging Face's VideoMAE takes square frames, not {height}x{width} tokens")
    size = height * patch
    config = dict(
        architectures=["VideoMAEModel"], model_type="videomae", image_size=size, patch_size=patch,
        num_frames=frames * tubelet, tubelet_size=tubelet, hidden_size=encoder.width,
        num_hidden_layers=len(encoder.blocks), num_attention_heads=encoder.blocks[0].attn.heads,
        intermediate_size=4 * encoder.width, layer_norm_eps=1e-6, qkv_bias=True, qv_bias=True,
        use_mean_pooling=head is not None, norm_pix_loss=True)
    state = hugging_face_names(encoder.state_dict(), "videomae." if decoder or head else "")
    if decoder:
        width = decoder.embed.out_features
        config |= dict(
            architectures=["VideoMAEForPreTraining"], decoder_hidden_size=width,
            decoder_intermediate_size=4 * width, decoder_num_hidden_layers=len(decoder.blocks),
            decoder_num_attention_heads=decoder.blocks[0].attn.heads)
        state |= hugging_face_names({f"decoder.{name}": x for name, x in decoder.state_dict().items()})
    if head:
        config |= dict(architectures=["VideoMAEForVideoClassification"], id2label=dict(enumerate(names)),
                       label2id={name: i for i, name in enumerate(names)})
        state |= hugging_face_names(head)
    processor = dict(
        image_processor_type="VideoMAEImageProcessor", do_resize=True, size=dict(shortest_edge=size), resample=2,
        do_center_crop=True, crop_size=dict(height=size, width=size), do_rescale=True, rescale_factor=1 / 255,
        do_normalize=True, image_mean=cmaev.MEAN, image_std=cmaev.STD)
    Path(folder).mkdir(parents=True, exist_ok=True)
    with cmaev.atomic_write(Path(folder) / "pytorch_model.bin", "wb") as file:
        torch.save(state, file)
    for name, content in (("config.json", config), ("preprocessor_config.json", processor)):
        with cmaev.atomic_write(Path(folder) / name) as file:
            json.dump(content, file, indent=1)


def main():
    parser = cmaev.argument_parser(__doc__)
    parser.add_argument("run", type=Path, help="a run of finetune.py or pretrain.py")
    parser.add_argument("folder", help="where to write")
    parser.add_argument("--best", action="store_true", help="best.pt of a fine-tuned run, not checkpoint.pt")
    s = parser.parse_args()
    if (s.run / "encoder.pt").is_file():  # pretrain.py alone writes it
        encoder = cmaev.load_encoder(s.run)
        decoder = cmaev.PixelDecoder(encoder)
        cmaev.load_encoder(s.run, encoder, decoder)
        save_hugging_face(s.folder, encoder, decoder)
    else:
        model = finetune.load(s.run, s.best)
        save_hugging_face(s.folder, model.encoder, head=head_state(model), names=model.names)
    print(f"{s.folder}: for transformers' from_pretrained")


if __name__ == "__main__":
    cmaev.run_script(main)

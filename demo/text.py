"""The demo's captions as tokens, and the loss of its text encoder, which has to tell a scene's labels from its caption.

The answers come from the last token, which has attended to all others. So it has to hold everything that a caption
says. The image LDM reads all tokens through cross-attention, as Stable Diffusion reads CLIP's.
"""

import itertools

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, embedding

from ..nodes.host.models import END, START, TextParams, tokenizer, unknown_token
from . import world
from .models import TEXT_HEADS, TEXT_LAYERS, TEXT_WIDTH

UNKNOWN_RATE = 0.03                     # of words replaced by the unknown token while training


def token_ids(captions, words):
    """ComfyUI's tokens of captions, (n, 77) int64; `words` is its tokenizer."""
    return torch.tensor([[int(token) for token, _ in words.tokenize_with_weights(caption)["l"][0]]
                         for caption in captions])


def text_params():
    """Params of the text encoder; its vocabulary is that of the captions the world can write."""
    words = tokenizer(TEXT_WIDTH)
    used = set(token_ids(vocabulary_captions(), words).flatten().tolist()) | {START, END}
    return TextParams(TEXT_WIDTH, TEXT_LAYERS, TEXT_HEADS, tuple(sorted(used)))


def vocabulary_captions():
    """Captions that use every word of the world: those of its first seeds, and some that an artist is likely to try."""
    cars = " and ".join(f"a {colour} car" for colour in world.COLOURS)
    phrases = [f"{crowd} {light}, {pace}, {bend}, {cars}" for crowd, light, pace, bend in itertools.product(
        ("an empty road", "a quiet road", "a busy road"), ("by day", "at night"), ("driving fast", "driving slow"),
        ("turning left", "going straight", "turning right"))]
    return phrases + ["a video of cars driving down the road in traffic, no car, trees, sky, street, the"]


def targets(labels):
    """The yes/no questions about a scene, float (q,): night, fast, left, right, crowdedness, and each colour."""
    return torch.tensor([labels["night"], labels["fast"], labels["steering"] < 0, labels["steering"] > 0,
                         labels["crowdedness"] == 0, labels["crowdedness"] == 1,
                         *(colour in labels["colours"] for colour in world.COLOURS)], dtype=torch.float32)


def encode_ids(encoder, ids):
    """Hidden states (n 77 d) and projected last token (n d) of token ids (n 77), as ComfyUI's CLIP computes them.

    All captions are looked up at once. CLIP's own entry point looks them up one by one, each over the whole table.
    """
    text_model = encoder.transformer.text_model
    embedded = embedding(ids, text_model.embeddings.token_embedding.weight)
    count = ((ids == END).int().argmax(dim=1) + 1).tolist()
    hidden, _, projected, _ = encoder.transformer(None, None, embeds=embedded, num_tokens=count, dtype=torch.float32)
    return hidden, projected


def let_gradients_through(encoder):
    """Give CLIP's norms a copy of their input. Its layers add to it in place, but the backward pass needs it."""
    for name, module in encoder.named_modules():
        if name.endswith(("layer_norm1", "layer_norm2")):
            module.register_forward_pre_hook(lambda module, args: (args[0].clone(), *args[1:]))


class TextLoss(nn.Module):
    """`loss(step)` for the Loop: answers to the questions from the projected last token."""

    def __init__(self, encoder, params, batch):
        super().__init__()
        self.encoder, self.words, self.batch = encoder, tokenizer(params.width), batch
        self.head = nn.Linear(params.width, len(targets(world.labels(world.scene(0)))))
        self.unknown = unknown_token(params)
        let_gradients_through(encoder)

    def __call__(self, step):
        draws = torch.randint(0, 1 << 30, (step.share(self.batch),), generator=step.generator)
        scenes = [world.scene(world.train_seed(int(seed))) for seed in draws]
        ids = token_ids([world.caption(scene) for scene in scenes], self.words)
        lost = (torch.rand(ids.shape, generator=step.generator) < UNKNOWN_RATE) & (ids != START) & (ids != END)
        ids = torch.where(lost, self.unknown, ids).to(step.device)
        _, pooled = encode_ids(self.encoder, ids)
        wanted = torch.stack([targets(world.labels(scene)) for scene in scenes]).to(step.device)
        answers = self.head(pooled)
        return {"loss": binary_cross_entropy_with_logits(answers, wanted),
                "right": ((answers > 0) == (wanted > 0.5)).float().mean()}

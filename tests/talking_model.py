"""A real model folder that says given lines whatever it is asked: a line is one token, which the next one follows."""

import pathlib
from collections.abc import Sequence

import numpy as np
import transformers
from tokenizers import AddedToken

from sami_jax.huggingface.families import config_to_huggingface
from sami_jax.huggingface.folder import save_model
from tiny_models import random_params, tiny_config, write_tokenizer

CHAT = (
    "{{ bos_token }}{% for m in messages %}</s>{{ m.role }}: {{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}</s>assistant: {% endif %}"
)


def write_talking_model(folder: pathlib.Path, lines: Sequence[str], *, template: str = CHAT) -> pathlib.Path:
    """Writes the folder. A prompt's last token is none of the lines', and the first line follows it.

    Args:
      folder: new.
      lines: that are said, then the end of the text; each different.
      template: for chats; "" for none.
    """
    parts = folder.with_name(f"{folder.name}.tokenizer")
    write_tokenizer(parts, "byte_level", bos=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(parts), local_files_only=True)
    tokenizer.add_tokens([AddedToken(line, normalized=False, special=False) for line in lines])
    if template:
        tokenizer.chat_template = template
    tokenizer.save_pretrained(str(parts))
    size = len(tokenizer)
    said = [tokenizer.convert_tokens_to_ids(line) for line in lines] + [tokenizer.eos_token_id]
    # Nothing is added to an embedding on its way to the head: which token follows depends on the last one alone.
    shape = tiny_config(vocab_size=size, max_positions=4096, embed_dim=len(said) + 1)
    params = random_params(shape)
    params["blocks"]["attention"]["out"][:] = 0.0
    params["blocks"]["mlp"]["down"][:] = 0.0
    params["final_norm"][:] = 1.0
    embedding, head = np.zeros_like(params["embedding"]), np.zeros_like(params["head"])
    embedding[:, 0] = 1.0
    for place, token in enumerate(said):
        head[place, token] = 1.0
        embedding[token] = np.eye(len(said) + 1)[place + 1]
    params["embedding"], params["head"] = embedding, head
    save_model(
        folder,
        params,
        shape,
        dtype="float32",
        huggingface_config=config_to_huggingface(shape, bos_token_id=1, eos_token_id=2),
        generation_config={},
        tokenizer_folder=parts,
        card="# Talks\n",
    )
    return folder

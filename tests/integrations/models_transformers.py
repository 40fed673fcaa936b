"""Small transformers with random weights, made from configurations."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

WORDS = ["[PAD]", "[UNK]", "the", "cat", "sat", "on", "a", "mat"]
PROMPT = torch.tensor([[2, 3, 4], [5, 6, 7]])


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of a few words."""
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")


def _with_fixed_weights(model_class, config):
    torch.manual_seed(0)
    return model_class(config).eval()


def gpt2(layers: int = 1):
    """Return a decoder that never ends by itself."""
    size = {"n_embd": 16, "n_head": 2, "n_layer": layers, "n_positions": 64, "vocab_size": len(WORDS)}
    return _with_fixed_weights(GPT2LMHeadModel, GPT2Config(**size, bos_token_id=2, eos_token_id=None, pad_token_id=0))


def t5():
    """Return an encoder with a decoder."""
    size = {"d_model": 16, "d_ff": 16, "d_kv": 8, "num_heads": 2, "num_layers": 1, "vocab_size": len(WORDS)}
    ends = {"decoder_start_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
    return _with_fixed_weights(T5ForConditionalGeneration, T5Config(**size, **ends))


def whisper():
    """Return an encoder of sound with a decoder."""
    size = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": len(WORDS)}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    ends = {"decoder_start_token_id": 1, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    model = _with_fixed_weights(WhisperForConditionalGeneration, WhisperConfig(**size, **heads, **ends))
    model.generation_config.eos_token_id = None
    return model


def bert(*, for_tokens: bool = False):
    """Return a classifier of texts, or of each of their tokens."""
    size = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    model_class = BertForTokenClassification if for_tokens else BertForSequenceClassification
    return _with_fixed_weights(model_class, BertConfig(**size, vocab_size=len(WORDS), num_labels=3))

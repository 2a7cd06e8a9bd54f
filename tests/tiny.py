"The tiny model that tests share: random in every part, and small enough to answer at once."

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from ibllm.config import (
    AudioConfig,
    BindConfig,
    CacheSettings,
    ImageBindConfig,
    IMUConfig,
    InputConfig,
    ModelConfig,
    TextConfig,
    VisionConfig,
)
from ibllm.model import ImageBindLLM


def tokenizer():
    words = "what is this ? a the red blue green ball bell plane sound of and describe it briefly"
    words = words.split()
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "<unk>", *words, "</s>"])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = dict(pad_token="<pad>", bos_token="<s>", unk_token="<unk>", eos_token="</s>")
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=TEMPLATE, **special)


TEMPLATE = """{{ bos_token }}{% for message in messages %}{{ message.content }}
{%- if message.context %} {{ message.context }}{% endif %}{% endfor %}"""
SIZE = len(tokenizer())


def config():
    small = dict(width=16, blocks=1, heads=2)
    towers = dict(
        vision=VisionConfig(**small, size=(32, 32), kernel=16, stride=16),
        text=TextConfig(**small, vocabulary=SIZE, context=12),
        audio=AudioConfig(**small, size=(32, 32)),
        imu=IMUConfig(**small, samples=64),
        point=None,
        depth=None,
        thermal=None,
    )
    inputs = InputConfig(
        image_size=32,
        audio_mel_bins=32,
        audio_frames=32,
        audio_rate=8000,
        text_length=12,
        imu_samples=64,
        imu_seconds=1.0,
    )
    return ModelConfig(
        ImageBindConfig(feature_dim=24, **towers),
        inputs,
        BindConfig(num_blocks=1),
        cache=CacheSettings(k=5),
    )


def make_model(kind="llama", **options):
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.4,
        max_position_embeddings=48,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=SIZE - 1,
    )
    if kind == "llama":
        llm = LlamaForCausalLM(LlamaConfig(**sizes, attention_bias=True))
    else:
        llm = Qwen2ForCausalLM(Qwen2Config(**sizes))
    llm.generation_config.max_new_tokens = 6
    model = ImageBindLLM(config(), llm, tokenizer(), text_tokenizer=tokenizer(), **options)
    torch.nn.init.normal_(model.injection.gates)
    return model


def image(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8)


def sound(seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, 8000).astype(np.float32)


def features(n, seed=0):
    return F.normalize(torch.randn(n, 24, generator=torch.Generator().manual_seed(seed)), dim=1)

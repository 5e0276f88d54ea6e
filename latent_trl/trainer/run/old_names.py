"""Names that TRL's PPO had for what is a field of an RL configuration here, or for what is none. Imports nothing."""

# The field of today; those of PPO alone are of `LatentActionPPOConfig`.
RENAMED = {
    "cliprange": "epsilon",
    "cliprange_value": "value_clip_range",
    "kl_coef": "beta",
    "lam": "gae_lambda",
    "max_new_tokens": "max_completion_length",
    "num_mini_batches": "steps_per_generation",
    "num_ppo_epochs": "num_iterations",
    "ppo_epochs": "num_iterations",
    "response_length": "max_completion_length",
    "vf_coef": "value_coef",
}
_CONSTRUCTOR = "pass it to the trainer"
OLD_NAMES = {
    **{old: f"it is called `{new}`" for old, new in RENAMED.items()},
    "kl_estimator": "`kl_in` says where the divergence goes; off a reward it is the difference of log-probabilities",
    "local_rollout_forward_batch_size": "rollouts are scored `per_device_train_batch_size` rows at a time",
    "max_prompt_length": "prompts are not cut; leave long ones out of the data set",
    "missing_eos_penalty": "punish long answers with `overlong_buffer`, or leave unended ones out with "
    "`mask_truncated_completions`",
    "num_sample_generations": "completions are logged with `log_completions`",
    "reward_model_path": f"a reward model's name is one of the trainer's `reward_funcs`; {_CONSTRUCTOR}",
    "sft_model_path": f"the policy's model is the trainer's `model`; {_CONSTRUCTOR}",
    "stop_token": "a completion ends at each `eos_token_id` of the model's generation config",
    "stop_token_id": "a completion ends at each `eos_token_id` of the model's generation config",
    "total_episodes": "the length of a run is `max_steps` or `num_train_epochs`",
    "whiten_rewards": "advantages are whitened, with `whiten_advantages`",
}

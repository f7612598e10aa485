"""What a trained model is used for: continuing prompts (`generate`) and scoring held-out text (`evaluate`)."""

"""Training of the embedded story model: corpus, model, optimisation, evaluation.  Not part of the wheel."""

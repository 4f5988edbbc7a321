"""Predictions of a recipe's memory and time on machines that are not here, and where its teacher should be placed."""

"""`dmae-ds plan`: what a recipe would cost on machines that aren't there, and where its teacher should live."""

"""The frozen teacher: read strictly, cut after the deepest block that is needed, streamed past the student."""

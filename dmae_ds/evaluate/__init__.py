"""What a student is worth: its frozen features, a vote among neighbours, the pictures it reconstructs. On accelerate."""

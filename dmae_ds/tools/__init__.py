"""The commands `dmae-ds teacher` and `dmae-ds checkpoint`: inspect, cut and convert files."""

"""The library behind the stages: records, the stage life cycle, models, text, the Hub, and the stand-in cloud."""

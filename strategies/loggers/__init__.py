"""What listens to a run's metrics: TensorBoard and MLflow. They see the lines of metrics.jsonl and nothing else."""

"""Public facts shipped with the package: six TCGA cohorts (sources: `tcga/SOURCES.md`)."""

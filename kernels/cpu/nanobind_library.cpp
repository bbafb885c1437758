// The part of nanobind that every extension is compiled with. Included rather than listed among the
// sources: setuptools takes no source outside the project.
#include <nb_combined.cpp>

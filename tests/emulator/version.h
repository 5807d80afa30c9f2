// Versions that the emulated libraries say they are of.
#pragma once
#include <cmath>
#include <cstdlib>

/// 12000 if the environment's variable says 12.0.
inline int emulated_version(const char* variable, int otherwise) {
    const char* text = std::getenv(variable);
    return text == nullptr ? otherwise : static_cast<int>(std::lround(std::atof(text) * 100)) * 10;
}

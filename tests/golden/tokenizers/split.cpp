// Prints how llama.cpp's own unicode.cpp cuts texts: the oracle of record.py, which builds it.
//
// Input, all words hexadecimal UTF-8: the first line holds the expressions, each further line one
// text. Output: per text a line with its pieces.

#include "unicode.h"

#include <cstdio>
#include <iostream>
#include <sstream>

static std::string from_hex(const std::string & hex) {
    std::string bytes;
    for (size_t i = 0; i + 1 < hex.size(); i += 2) {
        bytes += (char) std::stoi(hex.substr(i, 2), nullptr, 16);
    }
    return bytes;
}

int main() {
    std::string line;
    std::getline(std::cin, line);
    std::vector<std::string> expressions;
    std::istringstream words(line);
    for (std::string word; words >> word;) {
        expressions.push_back(from_hex(word));
    }
    while (std::getline(std::cin, line)) {
        for (const auto & piece : unicode_regex_split(from_hex(line), expressions, false)) {
            for (const unsigned char c : piece) {
                printf("%02x", c);
            }
            printf(" ");
        }
        printf("\n");
    }
}

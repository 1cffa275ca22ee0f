// How a family makes instructions of words.
#pragma once

#include <initializer_list>
#include <string>
#include <vector>

#include "machine.h"

namespace ptx {

// The words of an opcode after the first, taken one by one. What is left over is unknown.
class Words {
 public:
  Words(const std::string& opcode, int line);
  const std::string& first() const { return words_[0]; }
  const std::string& opcode() const { return opcode_; }
  // Takes the word if it is there, wherever it stands.
  bool take(const char* word);
  // Takes the first of these that is there; its index, or -1.
  int take_one(std::initializer_list<const char*> words);
  // The same, and unknown if none is there.
  int need_one(std::initializer_list<const char*> words);
  // Takes the next word, whatever it is; empty if there is none.
  std::string next();
  std::string peek() const;
  // Unknown if anything is left.
  void end() const;
  [[noreturn]] void unknown(const std::string& what) const;

 private:
  std::string opcode_;
  std::vector<std::string> words_;
  int line_;
};

// Fills in `run`, `data`, `aligned` of an instruction whose operands are there. Throws Unknown.
using Decode = void (*)(Words& words, Instr& instr);

// By the first word of an opcode: `static const Family add("add", decode_add);` in a family's file.
struct Family {
  Family(const char* word, Decode decode);
};
Decode family(const std::string& word);  // null if there is none

// Operands as an instruction takes them; Unknown if not.
void need_operands(const Words& words, const Instr& instr, size_t least, size_t most);

}  // namespace ptx
